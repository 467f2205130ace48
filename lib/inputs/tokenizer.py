"""A fetched model's tokenizer."""

import os
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lib.base.atomic import read_json
from lib.base.errors import UserError, reading
from lib.inputs.records import Messages


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    must_exist(folder)
    with reading(f"the tokenizer in {folder} cannot be read", "run `make fetch` again"):
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        assert found is not None, "of no known kind"
        assert isinstance(found.model_max_length, int | float), "model_max_length is no number"
        return found


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> str:
    """A conversation by its model's template, up to where the assistant begins."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)  # with tokenize=False
    return text


def must_exist(folder: str) -> None:
    """A folder with a whole model: transformers would put an adapter into it, or ask whether to run code of it."""
    if os.path.lexists(Path(folder) / "adapter_config.json"):  # a link to nowhere, too: transformers would follow it
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), which is not computed here: merge it into its model "
            "(peft: merge_and_unload, save_pretrained) and use that folder, or remove the adapter's files"
        )
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no model (config.json is missing); run `make fetch`")
    for name in ("config.json", "tokenizer_config.json"):
        about = read_json(Path(folder) / name) or {}
        if about.get("auto_map"):
            raise UserError(
                f"{folder}/{name} asks for Python code of its own (auto_map), which is never run; choose a model that "
                "transformers knows by itself"
            )
