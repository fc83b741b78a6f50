"""Evaluates OpenAI's weights on OpenWebText, in the size given: `configs/eval_gpt2.py:gpt2-medium`.

nanoGPT's config/eval_gpt2*.py: 500 batches of 8 × 1,024 tokens of each split. Its README has 3.12, 2.84, 2.67 and 2.54
for the four sizes on the validation split. `python -m jaxgpt.evaluate` reads the whole split.
"""

from jaxgpt.config import GPT2_SIZES, default_config


def get_config(size: str = "gpt2"):
    if size not in GPT2_SIZES:
        raise ValueError(f"eval_gpt2 has no size {size!r}; choose {', '.join(GPT2_SIZES)}")
    c = default_config()
    c.out_dir = f"out-eval-{size}"
    c.init_from = size
    c.n_layer, c.n_head, c.n_embd = GPT2_SIZES[size]
    c.bias = True
    c.eval_only = True
    c.batch_size = 8
    c.gradient_accumulation_steps = 1
    c.eval_iters = 500  # for a good estimate
    return c
