"""The modern model to nanoGPT's loss, sooner. One dial, the depth; `configs/speedrun.py:d12` is as large as GPT-2 124M.

    python -m jaxgpt.train --config configs/speedrun.py:d12 --config.data_dir=data/fineweb10b

On one H100 (2026-11-26, jax 0.11.2) nanoGPT's recipe takes 163 s of steps to 3.518 on 26M tokens of prose. d6 reached
3.452, the mean of three seeds, in 7.1 s, and d12 in FP8 (--config.matmul_dtype=fp8) 3.505 in 16.5 s: docs/speedrun.md.

Rules, from the depth alone: a head of 128 features for every two layers, so a width of 64 to a layer. 32 sequences ×
1,024 tokens = 32,768 tokens a step. 330 · (12 / depth)^0.6 steps: as many as the loss takes that nanoGPT's recipe ends
at. Rates do not depend on the size: the updates of Muon, and those of Adam to the tables, are as large in any width.
"""

from jaxgpt.config import default_config

DEPTHS = range(2, 25)


def get_config(size: str = "d6"):
    if not size.startswith("d") or not size[1:].isdecimal() or int(size[1:]) not in DEPTHS:
        raise ValueError(f"speedrun has no size {size!r}; choose d{DEPTHS[0]} to d{DEPTHS[-1]}")
    depth = int(size[1:])
    c = default_config("modern")
    c.out_dir = f"out-speedrun-{size}"
    c.dataset = "fineweb10b"
    c.n_layer = depth
    c.n_head = (depth + 1) // 2
    c.n_embd = 128 * c.n_head
    c.value_embeds = min(3, depth // 2)
    c.sampled_softmax = 16384  # a step's 32,768 targets are some 6,000 different tokens
    c.batch_size = 32
    c.gradient_accumulation_steps = 1
    c.max_iters = c.lr_decay_iters = c.eval_interval = 10 * round(33 * (12 / depth) ** 0.6)
    c.eval_iters = 0  # the whole validation split
    c.log_interval = 10
    c.optimizer = "muon"
    c.learning_rate = 0.025
    c.embedding_lr = 0.15
    c.head_lr = 0.006
    c.vector_lr = 0.01
    c.weight_decay = 0.1
    c.beta1 = 0.8
    c.beta2 = 0.99
    c.grad_clip = 0.0  # Muon's updates have one size, whatever the gradient's
    c.lr_schedule = "linear"
    c.cooldown = 0.6
    c.warmup_iters = 20
    c.min_lr = 0.05 * c.learning_rate
    c.momentum_warmup_iters = 200
    c.wandb_project = "speedrun"
    c.wandb_run_name = size
    return c
