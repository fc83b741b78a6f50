"""Fine-tunes GPT-2 on Shakespeare: nanoGPT's config/finetune_shakespeare.py. The argument is the weights to start from:
`:gpt2`, `:gpt2-medium`, `:gpt2-large`, `:gpt2-xl` (the default), or a folder, `:my-gpt2`.

1 sequence × 1,024 tokens × 32 micro-steps = 32,768 tokens a step: 9.2 steps go through the text's 301,966 once.
"""

from jaxgpt.config import default_config


def get_config(init_from: str = "gpt2-xl"):
    c = default_config()
    c.out_dir = "out-shakespeare"
    c.init_from = init_from
    c.n_layer = c.n_head = c.n_embd = 0  # the weights'
    c.bias = True
    c.dataset = "shakespeare"
    c.eval_interval = 5
    c.eval_iters = 40
    c.always_save_checkpoint = False  # only when the validation loss improves
    c.batch_size = 1
    c.gradient_accumulation_steps = 32
    c.max_iters = 20
    c.learning_rate = 3e-5
    c.decay_lr = False  # a constant rate
    c.wandb_project = "shakespeare"
    c.wandb_run_name = f"ft-{init_from}"
    return c
