"""
Makes the folders beside this file: one tiny random checkpoint per family, as transformers 5.24 writes it, and the
logits that it gives. Run once: `python tests/tiny_models/make.py` (pip install transformers).
"""

import json
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent
SIZES = dict(vocab_size=37, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=20, max_position_embeddings=48, rms_norm_eps=1e-3, initializer_range=0.3)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)  # the logits are of 40 tokens, beyond the original length
MODELS = {
    "gpt2": ("GPT2", dict(vocab_size=37, n_embd=24, n_layer=2, n_head=3, n_positions=48, initializer_range=0.3)),
    "llama": ("Llama", SIZES | dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2", SIZES | dict(rope_parameters=dict(rope_type="default", rope_theta=100.0))),
    "qwen3": ("Qwen3", SIZES | dict(head_dim=10, tie_word_embeddings=True))}

if __name__ == "__main__":
    for name, (family, sizes) in MODELS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes, bos_token_id=0, eos_token_id=0)
        model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config).eval()
        with torch.no_grad():
            for p in model.parameters():  # gains and biases away from 1 and 0
                p += 0.2 * torch.randn(p.shape) * (p.dim() == 1)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        idx = torch.randint(37, (2, 40))
        with torch.no_grad():
            logits = model(idx).logits
        (HERE / name / "logits.json").write_text(json.dumps({"ids": idx.tolist(), "logits": [
            [round(x, 5) for x in row] for row in logits.flatten(0, 1).tolist()]}) + "\n")
        print(name, f"logits up to {logits.abs().max():.1f}")
