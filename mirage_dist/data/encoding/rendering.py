"""A program that renders a chat template in jinja's sandbox, within limits on its own time and memory.

`encoding.templates` starts it: in a process of its own a rendering without an end harms nothing, and a new process,
unlike a fork, costs a rank that holds a model no memory. It imports nothing of this package, and of others only jinja2.

Standard input: a JSON object of `template`, `variables`, `examples` (lists of messages), `seconds` of processor time
and `memory` in bytes for all of them, and `longest`, the characters that one may have. Standard output: the bound that
the template exceeds, as JSON text, or null. Every other fault of a template is left to the rendering that counts.
"""

import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, with which templates mark what a model writes."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> ImmutableSandboxedEnvironment:
    """One with what transformers gives to templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = time.strftime
    return made


def exceeded(task: dict[str, Any]) -> str | None:
    """The bound that the template of a task exceeds; None if there is none."""
    try:
        template = environment().from_string(task["template"])
        for messages in task["examples"]:
            generate = messages[-1]["role"] == "user"
            with suppress(TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
                text = template.render(messages=messages, add_generation_prompt=generate, **task["variables"])
                if len(text) > task["longest"]:
                    return f"it writes more than {task['longest']:,} characters for a conversation"
    except MemoryError:
        return f"it takes more than {task['memory'] >> 20} MiB for a conversation"
    except Exception:
        return None  # no template; the rendering that counts says why
    return None


def _raise(message: str) -> None:
    raise TemplateError(message)


def main() -> None:
    task = json.load(sys.stdin)
    seconds = math.ceil(time.process_time() + task["seconds"])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with suppress(OSError, ValueError):  # without /proc only time is bounded
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + task["memory"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print(json.dumps(exceeded(task)))


if __name__ == "__main__":
    main()
