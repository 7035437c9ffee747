"""Chat templates that write a conversation as the published template of each family does.

Pictures are content parts `{"type": "image"}`; the text-only ones (LLAMA_TEXT, QWEN3_TEXT) take content as a string.
"""

from __future__ import annotations

# "USER: <image>\nquestion ASSISTANT: answer "; no mark ends an answer.
LLAVA = """\
{%- for turn in messages -%}
{%- if turn.role != "system" -%}{{ turn.role | upper }}: {% endif -%}
{%- for part in turn.content if part.type == "image" -%}{{ "<image>\n" }}{%- endfor -%}
{%- for part in turn.content if part.type == "text" -%}{{ part.text ~ " " }}{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}ASSISTANT:{%- endif -%}
"""

# "[INST] <image>\nquestion [/INST] answer</s> "; there is nothing to add for a generation prompt.
MISTRAL_INST = """\
{%- for turn in messages -%}
{%- if turn.role == "system" -%}{{ "<<SYS>>\n" ~ turn.content[0].text ~ "\n<</SYS>>\n\n" }}
{%- elif turn.role == "user" -%}
{{ "[INST] " }}
{%- for part in turn.content if part.type == "image" -%}{{ "<image>\n" }}{%- endfor -%}
{%- for part in turn.content if part.type == "text" -%}{{ part.text }}{%- endfor -%}
{{ " [/INST]" }}
{%- elif turn.role == "assistant" -%}{{ " " ~ turn.content[0].text ~ "</s> " }}
{%- else -%}{{ raise_exception("roles are system, user and assistant") }}
{%- endif -%}
{%- endfor -%}
"""

# ChatML; after a picture a new line.
CHATML_PICTURE_LINE = """\
{%- for turn in messages -%}
{{ "<|im_start|>" ~ turn.role ~ "\n" }}
{%- if turn.content is string -%}{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == "image" -%}{{ "MARK\n" }}{%- elif part.type == "text" -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}
"""
LLAVA_QWEN = CHATML_PICTURE_LINE.replace("MARK", "<image>")
INTERNVL = CHATML_PICTURE_LINE.replace("MARK", "<IMG_CONTEXT>")

# The role and a space, then each text on a line of its own: an answer begins "assistant \n", a generation prompt ends
# "assistant\n".
ONEVISION = """\
{%- for turn in messages -%}
{{ "<|im_start|>" ~ turn.role ~ " " }}
{%- for part in turn.content if part.type == "image" -%}<image>{%- endfor -%}
{%- for part in turn.content if part.type == "text" -%}{{ "\n" ~ part.text }}{%- endfor -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}
"""

# ChatML; a picture between vision marks. Qwen3-VL has no default system prompt.
QWEN3_VL = """\
{%- for turn in messages -%}
{{ "<|im_start|>" ~ turn.role ~ "\n" }}
{%- if turn.content is string -%}{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == "image" or "image" in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == "video" or "video" in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif "text" in part -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\n" }}{%- endif -%}
"""
QWEN2_VL = (
    """\
{%- if messages[0].role != "system" -%}
{{ "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" }}
{%- endif -%}
"""
    + QWEN3_VL
)

# "User:<image>question<end_of_utterance>\nAssistant: answer<end_of_utterance>\n": a space after the colon only before
# text.
UTTERANCES = """\
{{- "START" -}}
{%- for turn in messages -%}
{{ turn.role | capitalize }}:{{ "" if turn.content[0].type == "image" else " " }}
{%- for part in turn.content -%}
{%- if part.type == "text" -%}{{ part.text }}{%- elif part.type == "image" -%}<image>{%- endif -%}
{%- endfor -%}
{{ "<end_of_utterance>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}Assistant:{%- endif -%}
"""
IDEFICS3 = UTTERANCES.replace("START", "<|begin_of_text|>")
SMOLVLM = UTTERANCES.replace("START", "<|im_start|>")

# The system prompt belongs to the first user turn; the assistant is "model"; text is trimmed; roles must alternate.
GEMMA3 = """\
{{- bos_token -}}
{%- set start = namespace(text="") -%}
{%- if messages[0].role == "system" -%}
{%- set first = messages[0].content -%}
{%- set start.text = (first if first is string else first[0].text) ~ "\n\n" -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- for turn in messages -%}
{%- if (turn.role == "user") != (loop.index0 is even) -%}
{{ raise_exception("user and assistant must alternate") }}
{%- endif -%}
{{ "<start_of_turn>" ~ ("model" if turn.role == "assistant" else turn.role) ~ "\n" }}
{{- start.text if loop.first else "" }}
{%- if turn.content is string -%}{{ turn.content | trim }}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == "image" -%}<start_of_image>{%- elif part.type == "text" -%}{{ part.text | trim }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ "<end_of_turn>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<start_of_turn>model\n" }}{%- endif -%}
"""

# A system block with dates where no picture is shown; a system prompt beside a picture is refused.
LLAMA_VISION = """\
{{- bos_token -}}
{%- set seen = namespace(picture=false) -%}
{%- for turn in messages if turn.content is not string -%}
{%- for part in turn.content if part.type == "image" -%}{%- set seen.picture = true -%}{%- endfor -%}
{%- endfor -%}
{%- set system = "" -%}
{%- if messages[0].role == "system" -%}
{%- set first = messages[0].content -%}
{%- set system = (first if first is string else first[0].text) | trim -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- if seen.picture and system -%}{{ raise_exception("a picture and a system prompt exclude each other") }}{%- endif -%}
{%- if not seen.picture -%}
{{ "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n" ~ system ~ "<|eot_id|>" }}
{%- endif -%}
{%- for turn in messages -%}
{{ "<|start_header_id|>" ~ turn.role ~ "<|end_header_id|>\n\n" }}
{%- if turn.content is string -%}{{ turn.content | trim }}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == "image" -%}<|image|>{%- elif part.type == "text" -%}{{ part.text | trim }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ "<|eot_id|>" }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{%- endif -%}
"""
LLAMA_TEXT = LLAMA_VISION

# A default system prompt in its own marks; no generation prompt, an answer follows [/INST] at once.
MISTRAL3 = """\
{{- bos_token -}}
{%- if messages[0].role == "system" -%}
{%- set first = messages[0].content -%}
{%- set system = first if first is string else first[0].text -%}
{%- set messages = messages[1:] -%}
{%- else -%}
{%- set system = "You are a helpful assistant." -%}
{%- endif -%}
{{ "[SYSTEM_PROMPT]" ~ system ~ "[/SYSTEM_PROMPT]" }}
{%- for turn in messages -%}
{%- if turn.role == "user" -%}
[INST]
{%- if turn.content is string -%}{{ turn.content }}
{%- else -%}
{%- for part in turn.content -%}
{%- if part.type == "text" -%}{{ part.text }}{%- elif part.type in ("image", "image_url") -%}[IMG]{%- endif -%}
{%- endfor -%}
{%- endif -%}
[/INST]
{%- elif turn.role == "assistant" -%}
{{ (turn.content if turn.content is string else turn.content[0].text) ~ eos_token }}
{%- else -%}{{ raise_exception("roles are system, user and assistant") }}
{%- endif -%}
{%- endfor -%}
"""

# PaliGemma is published without a template: the question, a new line, the answer, as its processor writes them.
PALIGEMMA = """\
{%- for turn in messages -%}
{%- for part in turn.content -%}
{%- if part.type == "image" -%}<image>{%- elif part.type == "text" -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{{ "<eos>" if turn.role == "assistant" else "\n" }}
{%- endfor -%}
"""

# The last answer follows an empty think block, earlier ones do not; enable_thinking=false writes it into the prompt.
QWEN3_TEXT = """\
{%- for turn in messages -%}
{{ "<|im_start|>" ~ turn.role ~ "\n" }}
{%- if turn.role == "assistant" and loop.last -%}{{ "<think>\n\n</think>\n\n" }}{%- endif -%}
{{ turn.content ~ "<|im_end|>\n" }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ "<|im_start|>assistant\n" }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ "<think>\n\n</think>\n\n" }}{%- endif -%}
{%- endif -%}
"""
