"Malformed files of examples, each named by line, field and repair; limits; notes; five thousand random injuries."
import codecs
import json
import random
import time
import tracemalloc

import pytest

from llmbook.corpora import BookError
from llmbook.task_data import FORMATS, Chat, Completion, Labelled, corrected, damage, inspect, read_task, write_task
from llmbook.task_files import Limits, TaskDataError, dump_rows, fault_table

GOOD = {"text": "A warm and funny film.", "label": "fresh"}
USER, ASSISTANT, SYSTEM = ({"role": r, "content": f"{r} speaks"} for r in ("user", "assistant", "system"))


def jsonl(*rows) -> bytes: return "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows).encode()


def chat(*turns, **more) -> dict: return {"messages": list(turns), **more}


def text(value: str) -> str: return '{"text": "%s", "label": "fresh"}' % value


# name: (bytes, line, field, words of what was found, words of the fix, certain)
MALFORMED = {
    "empty": (b"", 1, "", "no rows", "choose a file", False),
    "only spaces": (b" \n\t\n", 1, "", "no rows", "choose a file", False),
    "empty list": (b"[]", 1, "", "no rows", "choose a file", False),
    "only a header": (b"text,label\n", 1, "", "no rows", "choose a file", False),
    "truncated row": (jsonl(GOOD) + b'{"text": "Two hours th', 2, "text", "breaks off", "get the file again", False),
    "truncated list": (b'[\n{"text": "a", "label": "x"},\n{"text": "b", "la', 3, "text", "breaks off", "get the file again", False),
    "unclosed list": (b'[{"text": "a", "label": "x"}', 1, "", "end of the file inside the list", "close the list", False),
    "latin-1": (jsonl(GOOD) + '{"text": "café", "label": "fresh"}\n'.encode("latin-1"), 2, "text", "byte 0xE9", "“é”", False),
    "latin-1 in CSV": ("text,label\nok,fresh\ncafé,fresh\n".encode("latin-1"), 3, "text", "byte 0xE9", "save the file as UTF-8", False),
    "byte-order mark": (codecs.BOM_UTF8 + jsonl(GOOD), 1, "", "byte-order mark of UTF-8", "without BOM", True),
    "UTF-16 with mark": (codecs.BOM_UTF16_LE + jsonl(GOOD).decode().encode("utf-16-le"), 1, "", "byte-order mark of UTF-16-LE", "UTF-8", True),
    "UTF-32 with mark": (codecs.BOM_UTF32_LE + jsonl(GOOD).decode().encode("utf-32-le"), 1, "", "UTF-32-LE", "UTF-8", True),
    "UTF-16 without mark": (jsonl(GOOD).decode().encode("utf-16-be"), 1, "", "UTF-16-BE without a mark", "save the file as UTF-8", False),
    "half a character": (b'{"text": "smile \\ud83d", "label": "fresh"}\n', 1, "text", "half a character", "both halves", False),
    "comma after a row": (jsonl(GOOD, json.dumps(GOOD) + ","), 2, "", "a comma after the row", "remove the comma", True),
    "comma in a row": (jsonl('{"text": "a", "label": "x",}'), 1, "", "a comma before a closing bracket", "remove the comma", True),
    "comma after the last of a list": (b'[{"text": "a", "label": "x"},\n]', 2, "", "1 comma before the end of the list", "remove it", True),
    "no comma in a list": (b'[{"text": "a", "label": "x"}\n{"text": "b", "label": "x"}]', 2, "", "no comma before the row", "add it", True),
    "two rows on a line": (jsonl(json.dumps(GOOD) + json.dumps(GOOD)), 1, "", "a second row", "break the line", True),
    "words after a row": (jsonl(GOOD, json.dumps(GOOD) + " # good one"), 2, "", "# good one", "remove it", False),
    "words after the list": (b'[{"text": "a", "label": "x"}]\n[{"text": "b", "label": "x"}]', 1, "", "after the list", "one list", False),
    "Python's dict": (jsonl(GOOD, "{'text': 'it\\'s', 'label': 'fresh'}"), 2, "", "Python's quotes", "double quotes", True),
    "Python's None": (jsonl("{'text': None, 'label': 'fresh'}"), 1, "text", "null", "remove the row", False),
    "line break in a text": (jsonl(text("a\tb")), 1, "", "a line break or a tab", r"\n or \t", True),
    "quote in a text": (jsonl(GOOD, text('a "great" film')), 2, "text", "JSON can't go on", r"\"", False),
    "backslash in a text": (jsonl(text(r"C:\data")), 1, "text", "JSON can't go on", r"\\", False),
    "typographic quotes": (jsonl("{“text”: “a”, “label”: “x”}"), 1, "", "JSON can't go on", "plain quotes", False),
    "field without quotes": (jsonl(GOOD, '{text: "a", label: "x"}'), 2, "", "JSON can't go on", "in double quotes", False),
    "a comment": (jsonl(GOOD, "// the good ones", GOOD), 2, "", "JSON can't go on", "true, false or null", False),
    "a word": (jsonl(GOOD, "hello"), 2, "", "JSON can't go on", "true, false or null", False),
    "a huge number": (jsonl(GOOD, '{"text": "a", "label": %s}' % ("9" * 5000)), 2, "label", "JSON can't go on", "in quotes", False),
    "a number as row": (jsonl(GOOD, "5"), 2, "", "found 5", "write it so", False),
    "null as row": (jsonl(GOOD, "null"), 2, "", "null", "write it so", False),
    "a list as row": (jsonl(GOOD, '["a", "x"]'), 2, "", "a list of 2", "write it so", False),
    "columns": (jsonl({"text": ["a", "b"], "label": ["x", "y"]}), 1, "", "columns", "orient", False),
    "rows in an object": (json.dumps({"data": [GOOD, GOOD]}).encode(), 1, "data", "inside an object", "keep only the list", True),
    "rows in an object with more": (json.dumps({"version": 1, "data": [GOOD, GOOD]}).encode(), 1, "data", "inside an object", "keep only the list", False),
    "rows over several lines": (b'{\n"text": "a",\n"label": "x"\n}\n{\n"text": "b",\n"label": "x"\n}\n', 1, "", "over several lines", "on one line", True),
    "deep nesting": (jsonl(GOOD, '{"text": ' + "[" * 60 + "]" * 60 + ', "label": "x"}'), 2, "", "nested 61 deep", "write its texts flat", False),
    "very deep nesting": (jsonl(GOOD, "[" * 200_000), 2, "", "nested 200,000 deep", "write its texts flat", False),
    "field twice": (jsonl(GOOD, '{"text": "a", "label": "x", "label": "y"}'), 2, "label", "twice", "remove one", False),
    "missing field": (jsonl(GOOD, {"text": "a"}), 2, "label", "nothing", "add it", False),
    "misspelt field": (jsonl(GOOD, {"text": "a", "lable": "fresh"}), 2, "lable", "a field named “lable”", "rename it to label", False),
    "other program's field": (jsonl({"sentence": "a", "label": "x"}), 1, "sentence", "“sentence”", "rename it to text", True),
    "field in capitals": (b"Text,LABEL\na,x\nb,x\n", 1, "Text", "“Text”", "rename it to text", True),
    "extra field": (jsonl(GOOD, {**GOOD, "source": "web"}), 2, "source", "“source”", "remove it", True),
    "column without a name": (b",text,label\n0,a,x\n1,b,x\n", 1, "", "a column without a name", "remove it", True),
    "empty text": (jsonl(GOOD, {**GOOD, "text": ""}), 2, "text", "an empty text", "fill it in", False),
    "only spaces in a text": (jsonl(GOOD, {**GOOD, "text": " \n "}), 2, "text", "only spaces", "fill it in", False),
    "null text": (jsonl(GOOD, {**GOOD, "text": None}), 2, "text", "null", "remove the row", False),
    "list as text": (jsonl(GOOD, {**GOOD, "text": ["a", "b"]}), 2, "text", "a list of 2", "remove the row", False),
    "number as text": (jsonl(GOOD, {**GOOD, "text": 42}), 2, "text", "the number 42", "in quotes", True),
    "NaN label": (jsonl(GOOD, '{"text": "a", "label": NaN}'), 2, "label", "NaN", "give the row its label", False),
    "nan label in CSV": (b"text,label\na,x\nb,nan\n", 3, "label", "“nan”", "give the row its label", False),
    "empty label in CSV": (b"text,label\na,x\nb,\n", 3, "label", "an empty text", "fill it in", False),
    "null label": (jsonl(GOOD, {**GOOD, "label": None}), 2, "label", "null", "give the row its label", False),
    "decimal label": (jsonl(GOOD, {**GOOD, "label": 1.0}), 2, "label", "decimal number 1.0", "write 1", True),
    "spaces around a label": (jsonl(GOOD, {**GOOD, "label": " fresh"}), 2, "label", "“ fresh”", "remove them", True),
    "label in capitals": (jsonl(GOOD, GOOD, {**GOOD, "label": "FRESH"}), 3, "label", "“FRESH”", "write “fresh”", True),
    "label misspelt once": (jsonl(*[GOOD] * 5, {**GOOD, "label": "frehs"}), 6, "label", "“frehs”, once", "write “fresh”", False),
    "text and label swapped": (jsonl(GOOD, {"text": "fresh", "label": "long " * 30 + "."}), 2, "label", "long long", "aren't swapped", False),
    "id twice": (jsonl({**GOOD, "id": 7}, GOOD, {**GOOD, "id": "7"}), 3, "id", "“7” again", "another id", False),
    "list as id": (jsonl({**GOOD, "id": [1]}), 1, "id", "a list of 1", "remove the field", False),
    "mixed formats": (jsonl(GOOD, GOOD, {"prompt": "a", "completion": "b"}), 3, "", "a row of the format completion", "file of its own", False),
    "no known field": (jsonl({"foo": "a", "bar": "b"}), 1, "", "foo, bar", "name the fields so", False),
    "no header": (b"a good film,fresh\na bad film,rotten\n", 1, "", "a good film,fresh", "above the rows", False),
    "an error page": (b"<!DOCTYPE html>\n<html><script>alert(1)</script></html>", 1, "", "<!DOCTYPE html>", "above the rows", False),
    "one field too many": (b"text,label\nwarm, and funny,fresh\n", 2, "", "3 fields", "double quotes", False),
    "one field too few": (b"text,label\na,x\nb\n", 3, "", "1 fields", "add what is missing", False),
    "two columns of a name": (b"text,label,Label\na,x,y\n", 1, "label", "two columns", "rename one", False),
    "unclosed quote": (b'text,label\n"a,x\nb,x\n', 2, "", "a quote that isn't closed", "close it", False),
    "quote inside a quoted field": (b'text,label\n"a "great" film",x\nb,x\n', 2, "", "a quote in the middle", '""', False),
    "chat in CSV": (b"messages\nhello\n", 2, "messages", "“hello”", "CSV can't hold it", False),
    "no messages": (jsonl(chat()), 1, "messages", "no message of the user", "remove the row", False),
    "message isn't an object": (jsonl(chat("hello", ASSISTANT)), 1, "messages[0]", "“hello”", 'write {"role"', False),
    "message without content": (jsonl(chat({"role": "user"}, ASSISTANT)), 1, "messages[0].content", "nothing", "add it", False),
    "empty content": (jsonl(chat(USER, {**ASSISTANT, "content": ""})), 1, "messages[1].content", "an empty text", "fill it in", False),
    "message with more": (jsonl(chat({**USER, "name": "Ann"}, ASSISTANT)), 1, "messages[0].name", "a field", "remove it", False),
    "unknown role": (jsonl(chat(USER, {**ASSISTANT, "role": "tool"})), 1, "messages[1].role", "“tool”", "one of these roles", False),
    "other program's role": (jsonl(chat({**USER, "role": "human"}, ASSISTANT)), 1, "messages[0].role", "“human”", "write user", True),
    "other program's chat": (jsonl({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}), 1, "conversations", "“conversations”", "rename it to messages", True),
    "assistant first": (jsonl(chat(ASSISTANT, USER, ASSISTANT)), 1, "messages[0].role", "assistant", "what the assistant answers to", False),
    "user twice": (jsonl(chat(USER, ASSISTANT), chat(SYSTEM, USER, USER, ASSISTANT)), 2, "messages[2].role", "second message of the user", "join", False),
    "system in the middle": (jsonl(chat(USER, SYSTEM, ASSISTANT)), 1, "messages[1].role", "system", "move it", False),
    "no answer": (jsonl(chat(USER, ASSISTANT, USER)), 1, "messages[2].role", "user", "remove the last message", False),
    "empty completion": (jsonl({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}), 2, "completion", "only spaces", "fill it in", False),
    "empty output": (jsonl({"instruction": "a", "input": "", "output": ""}), 1, "output", "an empty text", "fill it in", False),
    "row too long": (jsonl(GOOD, text("a" * 1_000_001)), 2, "", "a row of 1,000,03", "shorten", False),
    "field too long in CSV": (b"text,label\n" + b"a" * 200_000 + b",x\nb,x\n", 2, "", "a field of more than", "shorten", False),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_file_is_named_by_line_field_and_fix(name):
    raw, line, where, found, fix, certain = MALFORMED[name]
    seen = inspect(raw)
    hits = [f for f in seen.faults if (f.line, f.field) == (line, where) and (found in f"found {f.found}") and fix in f.fix]
    assert len(hits) == 1 and hits[0].certain == certain, [str(f) for f in seen.faults]
    with pytest.raises(TaskDataError, match="nothing was read") as e: read_task(raw)
    assert str(hits[0]) in str(e.value) and e.value.faults == seen.faults
    assert line not in seen.data.lines or not where or name.startswith("rows in")      # the row itself isn't handed out
    mended = corrected(raw)
    assert (mended is not None) == all(f.certain for f in seen.faults)
    if mended is not None:
        assert inspect(mended).faults == [] and len(read_task(mended)) == len(seen.mended)
        repaired = read_task(raw, repair=True)
        assert repaired.rows == read_task(mended).rows and repaired.mended == list(seen.faults)


def test_all_faults_of_a_file_come_together_in_order_up_to_a_limit():
    raw = jsonl(*[GOOD, {**GOOD, "text": ""}, {**GOOD, "label": None}] * 50)
    with pytest.raises(TaskDataError) as e: read_task(raw)
    report = str(e.value).splitlines()
    assert e.value.faults.total == 100 and [f.line for f in e.value.faults] == sorted(f.line for f in e.value.faults)
    assert len(report) == 1 + 20 + 1 and report[-1] == "  and 80 more."
    with pytest.raises(TaskDataError) as e: read_task(raw, limits=Limits(report=3))
    assert len(str(e.value).splitlines()) == 5
    assert len(inspect(raw).data) == 50 and len(inspect(jsonl(*[{**GOOD, "text": ""}] * 5000)).faults) == 1000


def test_a_broken_row_does_not_hide_the_rows_after_it():
    pretty = json.dumps([GOOD] * 3, indent=2).replace('film."', 'film.', 1)             # the first row's quote is lost
    flat = json.dumps([chat(USER, ASSISTANT)] * 3).replace('speaks"', "speaks", 1)
    for raw, n in ((pretty, 2), (flat, 2), ('text,label\n"a,x\nb,x\nc,x\n', 2)):
        seen = inspect(raw.encode())
        assert len(seen.data) == n and seen.faults.total == 1, [str(f) for f in seen.faults]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_csv_of_any_delimiter_and_line_end(delimiter, newline):
    rows = [f"text{delimiter}label", f'"first{delimiter} {newline}and ""second"""{delimiter}x', "", f"third{delimiter}y"]
    data = read_task(newline.join(rows).encode())
    assert [r.text for r in data.rows] == [f'first{delimiter} {newline}and "second"', "third"] and data.lines == [2, 5] and data.labels == ["x", "y"]


def test_kinds_and_formats_are_told_by_content():
    rows = {"labelled": GOOD, "completion": {"prompt": "a", "completion": " b"}, "alpaca": {"instruction": "a", "output": "b"}, "chat": chat(SYSTEM, USER, ASSISTANT, USER, ASSISTANT)}
    for name, row in rows.items():
        for raw in (jsonl(row, row), json.dumps([row, row]).encode(), json.dumps([row, row], indent=3).encode(), json.dumps(row, indent=1).encode()):
            data = read_task(raw)
            assert data.format == name and isinstance(data.rows[0], FORMATS[name]) and data.rows[0].model_dump(exclude_none=True, exclude_defaults=True) == row
    data = read_task(jsonl(*({"text": str(i), "label": v} for i, v in enumerate([10, 9, True, "b", 9]))))
    assert data.labels == ["9", "10", "b", "true"] and data.counts() == {"9": 2, "10": 1, "b": 1, "true": 1}
    assert read_task(jsonl(rows["completion"]), format="completion").format == "completion"
    with pytest.raises(TaskDataError): read_task(jsonl(rows["completion"]), format="labelled")
    with pytest.raises(BookError, match="no format 'csv'.*choose"): read_task(jsonl(GOOD), format="csv")


def test_notes_are_no_faults():
    def note(*rows): return [(n.line, n.field, n.found) for n in read_task(jsonl(*rows)).notes]
    def many(n, label): return [{"text": f"{label} {i}", "label": label} for i in range(n)]
    assert note(*many(5, "a"), *many(5, "b")) == []
    assert note(*many(5, "a"), {"text": "x", "label": "zebra"}) == [(6, "label", "“zebra”, a class with one row")]
    assert note(*many(40, "a"), *many(2, "b")) == [(41, "label", "2 of “b” and 40 of “a”")]
    assert note(*many(3, "a"))[0][2] == "“a” in every row"
    assert note(*many(5, "a"), *many(5, "b"), {"text": "a 0", "label": "b"})[0] == (11, "label", "another label than “a” for the text of line 1")
    assert note(*many(5, "a"), *many(5, "b"), {"text": "a 0", "label": "a"})[0] == (11, "", "a copy of line 1")


def test_large_files_are_refused_quickly_and_in_little_memory(tmp_path):
    path = tmp_path / "large.jsonl"
    with open(path, "wb") as f:
        f.write(jsonl(GOOD, GOOD))
        f.truncate(200_000_000)
    tracemalloc.start()
    start = time.process_time()
    faults = inspect(path).faults
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(faults) == 1 and faults[0].line == 3 and "200 MB, and a line of more than 1 MB" in faults[0].found
    assert seconds < 5 and peak < 10e6
    assert "at most 0 MB" in inspect(jsonl(GOOD), limits=Limits(file=10)).faults[0].expected


def test_a_path_that_is_no_file_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "none.json", "a\0b"):
        with pytest.raises(BookError, match="can't be read.*give the path"): read_task(path)


def test_writing_is_whole_or_not_at_all(tmp_path):
    rows = [Labelled(text="a,\n\"b\"", label="x", id=3), Labelled(text=" c\r\nd ", label="y")]
    for kind in ("json", "jsonl", "csv"):
        write_task(tmp_path / f"rows.{kind}", rows)
        back = read_task(tmp_path / f"rows.{kind}").rows
        assert [(r.text, r.label) for r in back] == [(r.text, r.label) for r in rows] and str(back[0].id) == "3" and back[1].id is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.csv", "rows.json", "rows.jsonl"]
    with pytest.raises(BookError, match="choose a name that ends in"): write_task(tmp_path / "rows.txt", rows)
    with pytest.raises(BookError, match="can't hold conversations"): write_task(tmp_path / "chat.csv", [Chat(messages=[USER, ASSISTANT])])


def test_scripts_are_shown_as_text():
    seen = inspect(jsonl({"text": "<script>alert(1)</script>", "label": " <b>x</b>"}, {"text": "", "label": "a"}))
    assert "<b>" not in seen._repr_html_() and "&lt;b&gt;" in seen._repr_html_() and "<table" in fault_table(seen.faults).html


def test_mutations_never_crash_and_never_slip_through():
    "5,000 injuries to sound files of every kind: a report or sound rows, and what is corrected is sound."
    rng = random.Random(20)
    labelled = [Labelled(text=f"Film {i} is “warm”, and\nfunny; isn't it?", label=rng.choice(["fresh", "rotten"]), id=i) for i in range(6)]
    chats = [Chat(messages=[SYSTEM, USER, ASSISTANT]), Chat(messages=[USER, ASSISTANT, USER, ASSISTANT])]
    completions = [Completion(prompt=f"Is {i} even?", completion=" yes") for i in range(4)]
    sound = [dump_rows([r.model_dump(exclude_none=True) for r in rows], kind) for rows in (labelled, chats, completions) for kind in ("json", "jsonl", "csv")[:2 if rows is chats else 3]]
    outcomes = {"read": 0, "refused": 0, "corrected": 0}
    for i in range(5000):
        raw = damage(sound[i % len(sound)], rng)
        seen = inspect(raw)
        if not seen.faults:
            assert seen.data.rows and all(type(r).model_validate(r.model_dump()) == r for r in seen.data.rows)
            outcomes["read"] += 1
            continue
        assert all(f.line >= 1 and f.found and f.expected and f.fix and str(f).isprintable() for f in seen.faults), (raw, list(seen.faults))
        str(seen.faults), seen._repr_html_(), str(TaskDataError("x", seen.faults)).encode()
        outcomes["refused"] += 1
        if (mended := corrected(raw)) is not None:
            assert inspect(mended).faults == [], (raw, mended)
            outcomes["corrected"] += 1
    assert outcomes["read"] > 100 and outcomes["corrected"] > 20, outcomes
