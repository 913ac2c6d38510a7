"""Whether a hub directory's own chat template is the one that is rendered here."""

import dataclasses
import re
import warnings
from pathlib import Path

from nemotron_jax.config.untrusted import parse_json, read_bytes
from nemotron_jax.data.chat.render import ANSWERS, REASONS, ChatOptions
from nemotron_jax.data.chat.tools import HEADING, INSTRUCTIONS

# What the family's template must write; a template is only searched for these, never executed.
_WRITTEN = (
    f"<|im_start|>assistant\n{REASONS}",
    f"<|im_start|>assistant\n{ANSWERS}",
    "\n</think>\n",
    HEADING.removesuffix("<tools>"),
    INSTRUCTIONS.strip(),
    "<tool_call>\n<function=",
    "\n</parameter>\n",
    "</function>\n</tool_call>\n",
    "<tool_response>\n",
    "\n</tool_response>\n",
)
_MOST_BYTES = 1 << 20  # of a template; the family's has 11 KB, and the search takes its time
_SWITCH = re.compile(r"\b(\w+)\s+if\s+\1\s+is\s+defined\b")


def template_differences(directory: str | Path) -> list[str]:
    """In what a directory's template differs from the one rendered here; empty without a template.

    It reads chat_template.jinja, else `chat_template` of tokenizer_config.json. A template that
    writes the same words in another order is not noticed.
    """
    try:
        template = _template_of(Path(directory))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"it cannot be read: {str(error)[:100]}"]
    if template is None:
        return []
    text = template.replace("\\n", "\n").replace("\\'", "'").replace('\\"', '"')
    found = [f"it never writes {words!r:.60}" for words in _WRITTEN if words not in text]
    known = {field.name for field in dataclasses.fields(ChatOptions)}
    switches = sorted(set(_SWITCH.findall(template)) - known)
    return found + [f"it has a switch {name}" for name in switches]


def warn_of_other_template(directory: str | Path) -> None:
    """A warning when the directory's template is another one: it is not the one in use."""
    if found := template_differences(directory):
        warnings.warn(
            f"{directory}: its chat template differs from the family's, which is used in its "
            f"place ({'; '.join(found[:3])}); templates of a hub are never executed",
            stacklevel=2,
        )


def _template_of(directory: Path) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return read_bytes(file, _MOST_BYTES).decode("utf-8")
    config = parse_json(read_bytes(directory / "tokenizer_config.json"))
    template = config.get("chat_template") if isinstance(config, dict) else None
    if isinstance(template, list):  # several under names; the first is the default
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((entry.get("template") for entry in named), None)
    if isinstance(template, str) and len(template) > _MOST_BYTES:
        raise ValueError(f"it is longer than {_MOST_BYTES} characters")
    return template if isinstance(template, str) else None
