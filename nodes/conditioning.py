"""Conditioning from a file of tensors, for models whose text encoder is not at hand."""

from __future__ import annotations

import os
from typing import Any

import folder_paths
from comfy_xdit_nodes.checkpoint import version_of
from comfy_xdit_nodes.pool import CATEGORY

from comfy_xdit.demo.conditioning import load

FOLDER = "conditioning"
SUFFIX = ".safetensors"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


class XDiTLoadConditioning:
    """What a text encoder once gave for a prompt."""

    DESCRIPTION = (
        "Takes a prompt's conditioning from a safetensors file in models/conditioning or the input folder. "
        'For each prompt the file has the tensors "<prompt>|context" and, for models that want it, "<prompt>|pooled".'
    )
    CATEGORY = CATEGORY
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("The prompt's conditioning, as from CLIP Text Encode.",)
    FUNCTION = "load"
    SEARCH_ALIASES = ("xdit", "prompt", "embedding", "text")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        prompt = {"default": "", "tooltip": "One of the prompts in the file, word for word; empty for none."}
        return {
            "required": {
                "file": (_files(), {"tooltip": "A file of models/conditioning or of the input folder."}),
                "prompt": ("STRING", prompt),
            }
        }

    @classmethod
    def IS_CHANGED(cls, file: str, **_: Any) -> str:
        return version_of(_path(file))

    def load(self, file: str, prompt: str) -> tuple[list[Any]]:
        context, pooled = load(_path(file), prompt.strip())
        return ([[context, {} if pooled is None else {"pooled_output": pooled}]],)


def _files() -> list[str]:
    models = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(SUFFIX)]
    inputs = [name for name in os.listdir(folder_paths.get_input_directory()) if name.endswith(SUFFIX)]
    return sorted(set(models + inputs))


def _path(file: str) -> str:
    path = folder_paths.get_full_path(FOLDER, file)
    if path is None:
        path = folder_paths.get_annotated_filepath(file)
        # The names come from _files; a prompt over HTTP may name anything.
        inside = os.path.realpath(folder_paths.get_input_directory()) + os.sep
        if not os.path.realpath(path).startswith(inside) or not os.path.isfile(path):
            raise ValueError(f"there is no {file!r} in models/{FOLDER} or the input folder")
    return path
