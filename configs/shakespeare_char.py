"""A character-level GPT on Shakespeare: nanoGPT's config/train_shakespeare_char.py, and `:cpu`, its recipe for a CPU.

10.7M parameters, 16,384 tokens a step, 5,000 steps; `:cpu` 0.8M parameters, 768 tokens a step, 2,000 steps. `:fast` and
`:cpu-fast` are the modern model of as many layers and the same width under Muon, in 440 and 840 steps.
"""

from jaxgpt.config import default_config

SIZES = ("full", "cpu", "fast", "cpu-fast")


def get_config(size: str = "full"):
    if size not in SIZES:
        raise ValueError(f"shakespeare_char has no size {size!r}; choose {', '.join(SIZES)}")
    fast, cpu = size.endswith("fast"), size.startswith("cpu")
    c = default_config("modern" if fast else "gpt2")
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
    if cpu:
        c.eval_iters = 20
        c.batch_size = 12
        c.block_size = 64
        c.n_layer = c.n_head = 4
        c.n_embd = 128
        c.dropout = 0.0
        c.max_iters = c.lr_decay_iters = 2000
    if fast:
        c.optimizer = "muon"
        c.lr_schedule = "linear"
        c.learning_rate = 0.02
        c.min_lr = 0.0
        c.embedding_lr = 0.1
        c.head_lr = 0.003
        c.weight_decay = 0.4
        c.beta1 = 0.8
        c.grad_clip = 0.0
        c.warmup_iters = 20
        c.value_embeds = 1
        c.n_head = c.n_head // 2
        c.eval_interval = 110
        c.eval_iters = 0  # the whole validation split
        c.max_iters = c.lr_decay_iters = 440
        c.momentum_warmup_iters = 200
    if size == "cpu-fast":
        c.batch_size = 24
        c.learning_rate = 0.015
        c.embedding_lr = 0.2
        c.head_lr = 0.01
        c.weight_decay = 0.0
        c.beta2 = 0.95
        c.cooldown = 0.8
        c.eval_interval = 168
        c.max_iters = c.lr_decay_iters = 840
    return c
