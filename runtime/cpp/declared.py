"""Writes what C++, C and JavaScript have of the declarations in Python: `python runtime/cpp/declared.py`.

That is source/declared.hpp; the options in include/u2moe.h, of which new ones are appended to their struct; and of
runtime/web declared.js, and the options in index.d.ts. A test compares what is committed.
"""

from __future__ import annotations

import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from u2moe.runtime import DecodingOptions, EndpointRule, LanguageModelOptions, VadOptions, options
from u2moe.runtime.bundle import contract
from u2moe.runtime.bundle.functions import KERNELS_CONTRACT
from u2moe.runtime.bundle.manifest import FeatureConfig, Manifest, ModelConfig
from u2moe.runtime.declarations import Option, default_of, options_of, plain
from u2moe.runtime.decoding import context, phrases
from u2moe.runtime.text import grammar
from u2moe.runtime.validation import MOST_INTEGER

RUNTIME = Path(__file__).parents[1]
HEADER, TYPES = RUNTIME / "cpp" / "include" / "u2moe.h", RUNTIME / "web" / "index.d.ts"
STRUCTS = {
    "ModelNumbers": (ModelConfig, ""),
    "FeatureNumbers": (FeatureConfig, ""),
    "StreamNumbers": (DecodingOptions, "u2moe_stream_options"),
    "LanguageModelNumbers": (LanguageModelOptions, "u2moe_language_model_options"),
    "VadNumbers": (VadOptions, "u2moe_vad_options"),
}
"""Structs of C++ with the numbers of a class, and those of C."""
BY_HAND = "chunk_size"
"""Means more than a number in other languages."""


def numbers(kind: type) -> dict[str, Option]:
    """The options of a class that are numbers."""
    found = options_of(kind).items()
    return {name: each for name, each in found if each.kind in ("integer", "number") and name != BY_HAND}


def class_in(kind: Any) -> tuple[str, type | None]:
    """{} if a type is a map, and the class of its values, or of what is in it; none: it is plain JSON."""
    if dataclasses.is_dataclass(kind):
        return "", kind
    found = next((each for _, each in map(class_in, get_args(kind)) if each), None)
    return "{}" * (get_origin(kind) is dict and found is not None), found


def records(kind: type) -> dict[str, str]:
    """Fields of a class and of those in it, as JSON, by the name of the class."""
    fields, inner, hints = {}, {}, get_type_hints(kind)
    for field in dataclasses.fields(kind):
        (prefix, found), default = class_in(hints[field.name]), default_of(field)
        defaults = [] if default is dataclasses.MISSING else [plain(default)]
        fields[field.name] = [prefix + (found.__name__ if found else ""), *defaults]
        inner |= records(found) if found else {}
    return {kind.__name__: json.dumps(fields)} | inner


def struct(name: str) -> str:
    """Numbers of a class, and a function that visits them."""
    members, visits, (kind, in_c) = "", "", STRUCTS[name]
    for option, each in numbers(kind).items():
        default = 0 if each.default is dataclasses.MISSING else each.default
        least = 1e-9 if each.above == 0 else each.least  # there are no exclusive limits
        most = each.most if each.most is not None else MOST_INTEGER if each.kind == "integer" else 1e9
        limits = f"Range{{{least:.10g}, {most:.10g}, {json.dumps(each.in_bundle)}}}"
        members += f"  {'int' if each.kind == 'integer' else 'double'} {option} = {default:g};\n"
        visits += f'    use("{option}", &{name}::{option}, {limits}{in_c and f", &{in_c}::{option}"});\n'
    return f"struct {name} {{\n{members}\n  template <class Use>\n  static void each(Use use) {{\n{visits}  }}\n}};\n"


def source() -> str:
    """source/declared.hpp."""
    searches = {name: f"k{name.title().replace('_', '')}" for name in options.SEARCHES}
    names = [f'{{"{n}", Search::{k}, {json.dumps(n not in options.WITHOUT_BEAM)}}}' for n, k in searches.items()]
    return f"""\
// What Python declares. Written by runtime/cpp/declared.py: do not change it here.
#pragma once

#include <cstddef>

#include "u2moe.h"

namespace u2moe::runtime {{

constexpr int kFormatVersion = {contract.FORMAT_VERSION}, kKernelsContract = {KERNELS_CONTRACT};
constexpr int kStreamChunkSize = {options.STREAM_CHUNK_SIZE};
constexpr double kShortestPauseS = {options.SHORTEST_PAUSE_S};
constexpr double kHotwordWeight = {context.DEFAULT_WEIGHT}, kMostHotwordWeight = {context.MOST_WEIGHT:g};
constexpr std::size_t kLongestHotword = {context.LONGEST_PHRASE};
constexpr float kRestPenalty = {phrases.REST_PENALTY}F;
constexpr double kRestCost = {phrases.REST_COST};
constexpr std::size_t kMinGrammarTokens = {phrases.MIN_TOKENS}, kMostPlaces = {phrases.MOST_PLACES};
constexpr std::size_t kLongestGrammarLine = {grammar.LONGEST_LINE};

enum class Search {{ kDefault, {", ".join(searches.values())} }};
struct SearchName {{
  const char* name;
  Search search;
  bool has_beam;
}};
constexpr SearchName kSearches[] = {{{", ".join(names)}}};

/// What a number may be, and whether a bundle may choose its default.
struct Range {{
  double least, most;
  bool in_bundle;
}};

{chr(10).join(map(struct, STRUCTS))}
/// Fields of the objects in bundle.json: the class of what is in them, after {{}} for a map, and their default.
constexpr const char* kDeclared = R"({{
{f",{chr(10)}".join(f'"{name}": {fields}' for name, fields in records(Manifest).items())}
}})";

}}  // namespace u2moe::runtime
"""


def c_header() -> str:
    """include/u2moe.h with the options of its structs, which keep their order."""
    text = HEADER.read_text(encoding="utf-8")
    for kind, in_c in filter(lambda pair: pair[1], STRUCTS.values()):
        begin, end = text.index(f"typedef struct {in_c} {{"), text.index(f"}} {in_c};")
        body = text[begin:end]
        for option, each in numbers(kind).items():
            left = "negative" if each.least == 0 else "0"
            default = f"{left}: as in the bundle" if each.in_bundle else f"{each.default:g}"
            comment = about(each) if f"{default}: " in each.help else f"{about(each)}; {default}"
            member = f"  {'int32_t' if each.kind == 'integer' else 'double'} {option};"
            line = textwrap.fill(f"{member:<29}/* {comment} */", 128, subsequent_indent=" " * 30 + "* ") + "\n"
            body, found = re.subn(rf"(?s)  \w+ {option};.*?\*/\n", lambda _, line=line: line, body)
            body += "" if found else line
        text = text[:begin] + body + text[end:]
    return text


def about(option: Option) -> str:
    """What an option means, without remarks."""
    return option.help if ": " in option.help else option.help.partition("; ")[0]


def camel(name: str) -> str:
    """A name as JavaScript has it."""
    return "written" if name == "text_format" else re.sub("_(.)", lambda match: match[1].upper(), name)


def members(kind: type) -> str:
    """Options of a class that are numbers, choices or flags, as members of an interface."""
    lines = ""
    for name, each in options_of(kind).items():
        types = {"flag": "boolean", "choice": " | ".join(f"'{choice}'" for choice in each.choices)}
        if each.kind not in ("record", "texts") and name != BY_HAND:
            default = "that of the bundle" if each.in_bundle else each.otherwise or json.dumps(each.default)
            told = "" if each.choices else f"{about(each)[:1].upper()}{about(each)[1:]}. "
            lines += textwrap.fill(f"  /** {told}Default: {default}. */", 128, subsequent_indent="   * ") + "\n"
            lines += f"  {camel(name)}?: {types.get(each.kind, 'number')}{' | null' * each.may_be_none};\n"
    return lines


def types_of() -> str:
    """index.d.ts with the options of its interfaces."""
    kinds = {kind.__name__: kind for kind in (DecodingOptions, EndpointRule, LanguageModelOptions, VadOptions)}
    marked = re.compile(r"( *// declared: (\w+)\n).*?( *// end\n)", re.DOTALL)
    text = TYPES.read_text(encoding="utf-8")
    return marked.sub(lambda found: f"{found[1]}{members(kinds[found[2]])}{found[3]}", text)


def names() -> str:
    """declared.js."""
    text = "/** Names of options. Written by runtime/cpp/declared.py: do not change it here. */\n\n"
    for name, kind in (("STREAM", DecodingOptions), ("LANGUAGE_MODEL", LanguageModelOptions), ("VAD", VadOptions)):
        own = [camel(each) for each in options_of(kind)]
        text += f"export const {name}_OPTIONS = {json.dumps(own)};\n"
    return text


def written() -> dict[Path, str]:
    """Each file, and what is to be in it."""
    declared = {RUNTIME / "cpp" / "source" / "declared.hpp": source(), RUNTIME / "web" / "declared.js": names()}
    return {**declared, HEADER: c_header(), TYPES: types_of()}


if __name__ == "__main__":
    for file, content in written().items():
        file.write_text(content, encoding="utf-8")
