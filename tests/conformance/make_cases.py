"""Write Python's results into the cases of this folder: after a new case, which needs no result, or an intended change
of results. python tests/conformance/make_cases.py"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "toys"))
from conformance import COMPUTED, FOLDER, PACKED, load
from packed import write_text

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for kind, computed in COMPUTED.items():
            content = load(kind)
            for case in content["cases"]:
                case["result"] = computed(case, content, Path(folder))
            cases = [json.dumps(each, ensure_ascii=False, separators=(",", ":")) for each in content.pop("cases")]
            shared = [f" {json.dumps(name)}: {json.dumps(each, ensure_ascii=False)}," for name, each in content.items()]
            text = "\n".join(["{", *shared, ' "cases": [\n  ' + ",\n  ".join(cases) + "\n ]", "}", ""])
            file = FOLDER / f"{kind}.json"
            if kind in PACKED:
                write_text(FOLDER / f"{kind}.json.xz", text)
                file.unlink(missing_ok=True)
            else:
                file.write_text(text, encoding="utf-8")
