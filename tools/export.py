"""
Writes a policy as a folder that Hugging Face's transformers reads, with its tokenizer.

    python -m tools.export --to=lima                                     out/atlas/ppo.pt
    python -m tools.export --checkpoint=out/hh/sft.pt --to=hh-sft

AutoModelForCausalLM and AutoTokenizer then give the same logits, ids and end of a response as this repository.
"""

from dataclasses import dataclass
from typing import Optional

from pretrained import FAMILIES, family_of, save_pretrained
from support.checkpoint import load_checkpoint
from support.flags import check_domains, require, run_script
from support.stages import load_policy
from tokenizer import DataError, run_tokenizer


@dataclass
class Config:
    checkpoint: str = "out/atlas/ppo.pt"  # an sft.pt or ppo.pt
    to: Optional[str] = None              # the folder to write; it must be empty or not exist


def main(config):
    check_domains(config)
    require(config.to, "--to names the folder to write: give one that does not exist")
    saved = load_checkpoint(config.checkpoint, "sft", "ppo", "rm")
    require(saved["stage"] != "rm", f"{config.checkpoint} is a reward model, and transformers has no class that holds "
            "its calibration: export an sft.pt or ppo.pt")
    encoding, _ = run_tokenizer(None, None, saved["tokenizer"])
    policy = load_policy(saved)
    save_pretrained(policy, encoding, config.to)
    sizes = policy.config
    print(f"wrote {config.to}: a {FAMILIES[family_of(sizes)].architecture} of {sizes.n_layer} layers and width "
          f"{sizes.n_embd}, and the tokenizer "
          f"{encoding.name} ({encoding.n_vocab:,} ids)")


if __name__ == "__main__":
    run_script(main, Config, __doc__, DataError, FileExistsError)
