"""GPT-2 from scratch on OpenWebText, in OpenAI's four sizes: `configs/gpt2.py:gpt2-medium`.

12 sequences × 1,024 tokens × 40 micro-steps = 491,520 tokens a step; 600,000 steps are 295B tokens. The larger sizes
take smaller micro-batches for the same tokens a step.
"""

from jaxgpt.config import GPT2_SIZES, default_config

BATCH_SIZE = {"gpt2": 12, "gpt2-medium": 6, "gpt2-large": 4, "gpt2-xl": 2}


def get_config(size: str = "gpt2"):
    if size not in GPT2_SIZES:
        raise ValueError(f"gpt2 has no size {size!r}; choose {', '.join(GPT2_SIZES)}")
    c = default_config()
    c.out_dir = f"out-{size}"
    c.n_layer, c.n_head, c.n_embd = GPT2_SIZES[size]
    c.batch_size = BATCH_SIZE[size]
    c.gradient_accumulation_steps = 480 // BATCH_SIZE[size]
    c.eval_interval = 1000
    c.log_interval = 10
    c.wandb_project = "owt"
    c.wandb_run_name = size
    return c
