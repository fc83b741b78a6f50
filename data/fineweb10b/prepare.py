"""FineWeb's sample of 10 billion tokens as the world trains GPT-2 on it: GPT-2 tokens, made by others, downloaded.

A file for validation and 103 of 100 million tokens for training, 20 GB in all; the reader takes them as they are. Run
again after a stop, it goes on where it was; with more --files it gets those that are missing.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxgpt import UserError, local_path, optional
from jaxgpt.cli import Parser, integer, run_main
from jaxgpt.corpus.shards import in_files
from jaxgpt.corpus.sources import silence
from jaxgpt.data import header_bytes
from jaxgpt.tokenizer import GPT2_VOCAB_SIZE, Meta, read_meta, write_meta

REPOSITORY, FILES = "kjj0/fineweb10B-gpt2", 103
SETTINGS = {"repository": REPOSITORY}


def main(argv: Sequence[str], folder: Path = Path(__file__).parent) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--files", type=integer, default=FILES, help="of 100 million tokens for training")
    parser.add_argument("--out_dir", type=local_path, default=folder, help="where the tokens go")
    args = parser.parse(argv)
    if not 1 <= args.files <= FILES:
        raise UserError(f"files={args.files} is not between 1 and {FILES}")
    meta = read_meta(args.out_dir)
    if meta and meta.settings != SETTINGS:
        raise UserError(f"{args.out_dir} holds another corpus; move it away or set --out_dir")
    for name in ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06}.bin" for i in range(1, args.files + 1))]:
        if not (args.out_dir / name).is_file():
            download(name, args.out_dir)
            print(f"{args.out_dir / name}", flush=True)
    shards = {split: records(args.out_dir, split) for split in ("train", "val")}
    about = {"source": f"{REPOSITORY} of the Hugging Face hub", "shards": shards, "settings": SETTINGS}
    write_meta(args.out_dir, Meta(GPT2_VOCAB_SIZE, eot=GPT2_VOCAB_SIZE - 1, **about))
    for split, files in shards.items():
        print(f"{args.out_dir}: {split} has {in_files(files)}")


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    """meta.json's of the files that are there. UserError on one that is damaged."""
    found = []
    for path in sorted(folder.glob(f"fineweb_{split}_*.bin")):
        size = path.stat().st_size
        if not (header := header_bytes(path, size)):
            raise UserError(f"{path} has not the header of FineWeb10B's files; delete it and run this again")
        with open(path, "rb") as f:
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        found.append({"file": path.name, "tokens": (size - header) // 2, "sha256": sha256})
    return found


def download(name: str, folder: Path) -> None:
    """One file of the repository. UserError without network or library."""
    hub = optional("huggingface_hub", "jaxgpt[data]", f"fetching {REPOSITORY}")
    errors = optional("huggingface_hub.errors", "jaxgpt[data]", f"fetching {REPOSITORY}")
    silence("huggingface_hub")  # its retries are twelve lines
    http_error = errors.HfHubHTTPError.__bases__[0]  # of the client underneath: httpx in 1.x, httpx2 in 2.x
    made = [path for path in (folder / ".cache" / "huggingface", folder / ".cache", folder) if not path.exists()]
    try:
        hub.hf_hub_download(REPOSITORY, name, repo_type="dataset", local_dir=folder)
    except (OSError, http_error) as error:
        for path in made:  # what the hub has begun there
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"cannot get {name} of {REPOSITORY} from the Hugging Face hub "
            f"({str(error).strip().splitlines()[0][:200]}); connect, or copy its files into {folder}"
        ) from None


if __name__ == "__main__":
    run_main(main)
