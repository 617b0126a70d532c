"""Pictures, samples and captions of a split in the text-to-image layout, and CLIP; for caption_retrieval.py."""
import hashlib

import numpy as np
import torch
import torch.nn.functional as F

from data_io.captions import read_texts, scan_numbered
from data_io.index import scan
from encoders.text import quiet_transformers
from encoders.vae import loading
from evaluations.extract import gather_rows, shard
from evaluations.features import full_float32
from evaluations.images import FolderImages, open_images
from runtime.errors import UserError
from runtime.files import is_folder


def read_pictures(folder):
    """(pictures {i}.png of a folder by ascending i, [i, ...]); numbers may be missing."""
    files = scan(folder, ".png") if is_folder(folder) else {}
    if not files:
        what = "holds no .png file" if is_folder(folder) else "is no folder"
        raise UserError(f"{folder} {what}; give a split with pictures such as 0.png, and samples of generate_t2i.py.")
    return FolderImages(folder, [folder / files[i] for i in sorted(files)]), sorted(files)


def read_samples(source, split):
    """(generated images, their caption numbers): a folder's file names, or the first of the split for an npz."""
    if is_folder(source):
        return read_pictures(source)
    images, numbers = open_images(source), sorted(set().union(*scan_numbered(split)))
    if images.n > len(numbers):
        raise UserError(f"{source} has {images.n} images, {split} only {len(numbers)}; give the split that the images "
                        "were made for.")
    return images, numbers[:images.n]


def caption_texts(folder, numbers, k):
    """[caption `k`] of the pictures `numbers`, from captions.json."""
    path = folder / "captions.json"
    captions = read_texts(path, {})
    if captions is None:
        raise UserError(f"{path} does not exist; the CLIP score needs the captions in words, retrieval does not: leave "
                        "--clip out.")
    for i in numbers:
        if k >= len(captions.get(i, ())):
            raise UserError(f"--caption-index {k}: image {i} of {folder} has {len(captions.get(i, ()))} captions in "
                            "words, counted from 0; choose a lower one.")
    return [captions[i][k] for i in numbers]


def distinct(images, batch_size):
    """(positions of the distinct pictures, each picture's index among these), int64 tensors. Equal pictures are one."""
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for batch in images.batches(0, images.n, batch_size)
               for image in batch]
    _, first, place = np.unique(digests, return_index=True, return_inverse=True)
    return torch.from_numpy(first), torch.from_numpy(place)


class Clip:
    """A frozen CLIP from a folder or the hub: images and captions to vectors of one space."""

    def __init__(self, source, device):
        with loading("The CLIP", source, "--clip a folder in transformers' format"):
            transformers = quiet_transformers()
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            model, info = transformers.CLIPModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True,
                                                                 output_loading_info=True)
            if info["missing_keys"]:  # transformers would only warn and draw random weights
                raise ValueError(f"it has no {min(info['missing_keys'])}")
            self.model = model.to(device).eval().float()
        side = model.config.vision_config.image_size
        self.processor = transformers.CLIPImageProcessor(size=side, crop_size=side)
        self.device = device

    @torch.no_grad()
    def images(self, batch):
        """uint8 (N, R, R, 3) -> (N, D)."""
        pixels = self.processor(list(batch), return_tensors="pt").to(self.device)
        with full_float32(self.device):
            return self.model.visual_projection(self.model.vision_model(**pixels).pooler_output)

    @torch.no_grad()
    def captions(self, texts):
        """N strings -> (N, D)."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt")
        with full_float32(self.device):
            return self.model.text_projection(self.model.text_model(**tokens.to(self.device)).pooler_output)


def clip_scores(clip, images, texts, batch_size):
    """100 max(cos, 0) of each image with its text, (n, 1) on process 0; None on the others."""
    start, stop = shard(images.n)
    rows, texts = [torch.zeros(0, 1)], texts[start:stop]
    for batch in images.batches(start, stop, batch_size):
        cosine = F.cosine_similarity(clip.images(batch), clip.captions(texts[:len(batch)]))
        rows.append(100 * cosine.clamp(min=0)[:, None].cpu())
        texts = texts[len(batch):]
    return gather_rows(torch.cat(rows))
