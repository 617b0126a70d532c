"""The frozen text encoder of captions: CLIP's text model or a BERT-like sentence encoder."""

import torch

from encoders.vae import loading
from runtime.errors import UserError

CLIP = "openai/clip-vit-large-patch14"  # the encoder of the published text-to-image data


def quiet_transformers():
    """transformers, without progress bars and without its report of unused weights (CLIP's image tower)."""
    import transformers  # takes seconds; only captions need it
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class TextEncoder:
    """Captions -> the last hidden states of a frozen CLIP text model or of a BERT-like sentence encoder.

    `source` is a local folder or a hub name, with safetensors. Every caption is padded or cut to `length` tokens
    (default: the tokenizer's maximum, 77 for CLIP). CLIP runs as published, without an attention mask: attention is
    causal, so padding does not reach the words. A BERT-like model sees words in both directions: padding is masked, and
    its positions hold zeros. Raises UserError when `source` cannot be loaded.
    """

    def __init__(self, source, device="cpu", length=None):
        with loading("The text encoder", source, "a folder with config.json, model.safetensors and the tokenizer"):
            transformers = quiet_transformers()
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            self.is_clip = config.model_type in ("clip", "clip_text_model")
            kind = transformers.CLIPTextModel if self.is_clip else transformers.AutoModel
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, info = kind.from_pretrained(source, trust_remote_code=False, use_safetensors=True,
                                               output_loading_info=True)
        # transformers would only warn and draw random weights
        missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
        if missing:
            raise UserError(f"The weights in {source} are not those of its config.json ({missing[0]} is missing); get "
                            "them again.")
        most = min(self.tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 0))
        if most < 1 or self.tokenizer.pad_token is None:
            raise UserError(f"{source} is a {config.model_type}, neither CLIP nor like BERT: it has no table of "
                            "positions or no padding; give another text encoder.")
        self.length = length or most
        if self.length > most:
            raise UserError(f"The text encoder {source} takes at most {most} tokens a caption, not {length}; ask for "
                            "fewer.")
        self.model, self.device = model.to(device, torch.float32).eval().requires_grad_(False), device
        self.width = model.config.hidden_size

    def count_cut(self, captions):
        """How many of these strings are longer than `length` tokens, so that their ends are not seen."""
        return sum(len(tokens) > self.length for tokens in self.tokenizer(list(captions)).input_ids)

    @torch.no_grad()
    def __call__(self, captions):
        """N strings -> float32 (N, L, C) on the CPU."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.device)
        if self.is_clip:
            return self.model(input_ids=tokens.input_ids).last_hidden_state.cpu()
        states = self.model(**tokens).last_hidden_state
        return (states * tokens.attention_mask[..., None]).cpu()

