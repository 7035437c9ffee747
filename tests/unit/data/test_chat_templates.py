"""Chat templates have bounds on time and memory, whatever they do, and an error names the file that holds them."""

import shutil
import time

import pytest

from mirage_dist.data.encoding import templates
from mirage_dist.data.encoding.conversation import Conversation
from mirage_dist.model.families import processors
from mirage_dist.schema import ConfigError

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def model(toy, tmp_path):
    folder = shutil.copytree(toy.root / "model", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (LOOPS + "{% endfor %}", "exceeds a bound: it takes more than 2 s"),
        ("{{ 'a' * 10**11 }}", "exceeds a bound: it takes more than 512 MiB"),
        ("{% set n = 10**11 %}{{ messages[0].role * n }}", "more than 512 MiB"),
        ("{{ 'a' | center(10**11) }}", "more than 512 MiB"),
        ("{{ '%100000000000d' % 1 }}", "more than 512 MiB"),
        ("{{ 'ab' * (10**7 * 2) }}", "exceeds a bound: it writes more than 16,777,216 characters"),
        ("x" * (1 << 20) + "x", "1,048,577 characters, above the limit of 1,048,576"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "renders no conversation: RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "renders no conversation: SecurityError"),
        ("{{ messages.__init__.__globals__ }}", "renders no conversation: SecurityError"),
        ("{{ raise_exception('not like this') }}", "renders no conversation: TemplateError: not like this"),
        ("{% include '/etc/passwd' %}", "renders no conversation: TypeError"),
        ("{% import 'os' as os %}", "renders no conversation: TypeError"),
        ("{{ 1 / 0 }}", "renders no conversation: ZeroDivisionError"),
        ("{% for", "renders no conversation: TemplateSyntaxError"),
        ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "renders no conversation: RecursionError"),
    ],
)
def test_a_template_without_an_end_or_a_use_is_refused_with_its_file(model, template, words):
    (model / "chat_template.jinja").write_text(template)
    start = time.process_time()
    with pytest.raises(ConfigError, match=f"chat_template.jinja: the chat template.*{words}"):
        processors.load(model)
    assert time.process_time() - start < 20


def test_a_rendering_that_only_some_conversation_makes_endless_is_stopped(model, monkeypatch):
    file = model / "chat_template.jinja"
    file.write_text("{% if 'zebra' in (messages | string) %}" + LOOPS + "{% endfor %}{% endif %}" + file.read_text())
    conversation = Conversation(processors.load(model), None)
    monkeypatch.setattr(templates, "SECONDS", 0.2)
    assert "horse" in conversation.text(False, [], "horse")
    with pytest.raises(templates.TooSlow, match="it takes more than 2 s"):
        conversation.text(False, [], "zebra")
    assert "horse" in conversation.text(False, [], "horse")


def test_a_template_is_checked_once_in_a_process(model, monkeypatch):
    processors.load(model)
    monkeypatch.setattr(templates.subprocess, "run", lambda *_, **__: pytest.fail("a second process"))
    processors.load(model)


def test_a_system_prompt_that_the_template_leaves_out_is_refused(model):
    file = model / "chat_template.jinja"
    processor = processors.load(model)
    written = Conversation(processor, "Answer in one word.").text(False, [], "horse")
    assert "Answer in one word." in written
    file.write_text(
        "{% for m in messages if m['role'] != 'system' %}{{ m['role'] }}: "
        "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}\n{% endfor %}"
    )
    processor = processors.load(model)
    assert "horse" in Conversation(processor, None).text(False, [], "horse")
    with pytest.raises(ConfigError, match="system_prompt: the model's chat template leaves a system prompt out"):
        Conversation(processor, "Answer in one word.")
