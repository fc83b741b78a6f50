"""A character-level GPT on Shakespeare: nanoGPT's config/train_shakespeare_char.py, and `:cpu`, its recipe for a CPU.

10.7M parameters, 16,384 tokens a step, 5,000 steps; `:cpu` 0.8M parameters, 768 tokens a step, 2,000 steps.
"""

from jaxgpt.config import default_config


def get_config(size: str = "full"):
    if size not in ("full", "cpu"):
        raise ValueError(f"shakespeare_char has no size {size!r}; choose full or cpu")
    c = default_config()
    c.out_dir = "out-shakespeare-char" if size == "full" else f"out-shakespeare-char-{size}"
    c.dataset = "shakespeare_char"
    c.eval_interval = 250  # often, because it will overfit
    c.log_interval = 10
    c.always_save_checkpoint = False  # keep the best: the newest are overfitted
    c.gradient_accumulation_steps = 1
    c.batch_size = 64
    c.block_size = 256
    c.n_layer = 6
    c.n_head = 6
    c.n_embd = 384
    c.dropout = 0.2
    c.learning_rate = 1e-3
    c.min_lr = 1e-4
    c.max_iters = c.lr_decay_iters = 5000
    c.warmup_iters = 100
    c.beta2 = 0.99  # a step sees few tokens
    c.wandb_project = "shakespeare-char"
    c.wandb_run_name = "mini-gpt"
    if size == "cpu":
        c.eval_iters = 20
        c.batch_size = 12
        c.block_size = 64
        c.n_layer = c.n_head = 4
        c.n_embd = 128
        c.dropout = 0.0
        c.max_iters = c.lr_decay_iters = 2000
    return c
