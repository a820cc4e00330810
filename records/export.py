"""`train_q0.py export`: a population as one Hugging Face model. It needs no transformers itself."""
import ast
import hashlib
import os
import re
import symtable
from pathlib import Path

import train_q0 as q
from records.mixture import load_mixture
from records.population import title
from records.runs import own_folder
from records.use import K, parser_of

MODELING = Path(__file__).with_name("modeling_q0.py")
EOT = "<|endoftext|>"


def export(argv):
    """Write a folder that transformers 5 loads, as AutoModelForCausalLM.from_pretrained(FOLDER,
    trust_remote_code=True), and AutoTokenizer likewise: one model, whose logits are the
    log-probabilities of the mixture. It is for inference; other architectures' layouts, such as
    llama's, do not hold it."""
    parser = parser_of(export)
    parser.add_argument("--k", **K)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new folder")
    args = parser.parse_args(argv)
    if os.path.lexists(args.out):
        raise q.UserError(f"{args.out} exists: give another --out")
    mixture = load_mixture(args.run, args.k, "cpu")
    if mixture.gate is not None:
        raise q.UserError(f"{title(mixture.folder)} has members that count, which that model has "
                          "not: export the run that it was made of")
    with own_folder(args.out.absolute().parent) as folder:
        write_folder(mixture, folder)
        folder.rename(args.out.absolute())
    q.say(f"members:{len(mixture.members)} written to {args.out}")


def write_folder(mixture, folder):
    """Write what transformers reads to an empty folder."""
    models = write_members(mixture, folder)
    mixture.check_mix(models)
    write_configs(mixture, models, folder)
    (folder / MODELING.name).write_text(modeling_source(), encoding="utf-8")
    if mixture.encoding:
        write_tokenizer(mixture, models[0].cfg.seq_len, folder)
    else:
        q.say(f"notice: {title(mixture.folder)} has no tokenizer, so the new folder has none")


# Weights and settings ----------------------------------------------------------------------------

def write_members(mixture, folder):
    """Write each member's weights in bf16 to a file of its own; one member is in memory at a time.
    Returns them without their weights."""
    M = len(mixture.members)
    models = []
    files = {}
    size = 0
    for n, i in enumerate(mixture.members):
        model = mixture.member(i)
        weights = {f"members.{n}.{name}": p.bfloat16() for name, p in model.named_parameters()}
        file = f"model-{n + 1:05}-of-{M:05}.safetensors"
        q.write_atomically(
            folder / file, lambda tmp: q.save_tensors(weights, tmp, {"format": "pt"}))
        files |= dict.fromkeys(weights, file)
        size += sum(w.nbytes for w in weights.values())
        models.append(model.to("meta"))
    q.save_json(folder / "model.safetensors.index.json", {
        "metadata": {"total_size": size}, "weight_map": files})
    return models


def write_configs(mixture, models, folder):
    """Write config.json and generation_config.json."""
    first = models[0]
    with q.reading("the manifest.json of the run"):
        eot = int(mixture.manifest["eot"])
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)
    dtypes = {model.cfg.precision for model in models}
    name = MODELING.stem
    q.save_json(folder / "config.json", {
        "model_type": "q0",
        "architectures": ["Q0ForCausalLM"],
        "auto_map": {"AutoConfig": f"{name}.Q0Config",
                     "AutoModelForCausalLM": f"{name}.Q0ForCausalLM"},
        "dtype": "float32" if "float32" in dtypes else "bfloat16",
        "vocab_size": first.vocab_size,
        "max_position_embeddings": first.cfg.seq_len,
        "tie_word_embeddings": False,
        **tokens,
        "script_sha256": hashlib.sha256(q.SOURCE.encode()).hexdigest(),
        "weights": mixture.weights,
        "members": [q.method_settings(model.cfg) for model in models]})
    q.save_json(folder / "generation_config.json", {**tokens, "use_cache": False})


# The modelling file -----------------------------------------------------------------------------

def modeling_source():
    """modeling_q0.py with what it imports from the script, and what that needs, written out."""
    source = MODELING.read_text(encoding="utf-8")
    imported, = [node for node in ast.parse(source).body
                 if isinstance(node, ast.ImportFrom) and node.module == "train_q0"]
    definitions = extract(q.SOURCE, {alias.name for alias in imported.names})
    lines = source.splitlines()
    lines[imported.lineno - 1:imported.end_lineno] = [definitions]
    return "\n".join(lines) + "\n"


def extract(source, names):
    """The top-level statements of `source` that define `names` or what those use, as text."""
    found = {}
    for node in ast.parse(source).body:
        for name in defined(node):
            found.setdefault(name, []).append(node)
    wanted = list(names)
    kept = set()
    while wanted:
        nodes = set(found.pop(wanted.pop(), ())) - kept
        kept |= nodes
        for node in nodes:
            wanted += used(node)
    numbers = set()
    for node in kept:
        parts = [node, *getattr(node, "decorator_list", ())]
        numbers |= {*range(min(part.lineno for part in parts), node.end_lineno + 1)}
    lines = [line for number, line in enumerate(source.split("\n"), 1)
             if number in numbers or not line]
    return re.sub("\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


def defined(node):
    """Names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.alias):
            names.add((part.asname or part.name).split(".")[0])
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
    return names


def used(node):
    """Global names that a statement uses."""
    names = set()
    tables = [symtable.symtable(ast.unparse(node), "", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        is_module = table.get_type() == "module"
        names |= {s.get_name() for s in table.get_symbols() if is_module or s.is_global()}
    return names


# The tokenizer ----------------------------------------------------------------------------------

def write_tokenizer(mixture, seq_len, folder):
    """Write tokenizer.json and tokenizer_config.json, which give the ids of `Mixture.encode`."""
    encoding = mixture.encoding
    eot = encoding.eot_token
    tokens = [encoding.decode_single_token_bytes(i) for i in range(eot)]
    ranks = {token: i for i, token in enumerate(tokens)}
    shown = {token: "".join(CHARACTERS[byte] for byte in token) for token in tokens}
    pairs = [last_merge(token, ranks) for token in tokens if len(token) > 1]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                "use_regex": False}
    words = {"type": "Split", "pattern": {"Regex": mixture.manifest["tokenizer"]["pattern"]},
             "behavior": "Isolated", "invert": False}
    begin = {"SpecialToken": {"id": EOT, "type_id": 0}}  # of every document
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    q.save_json(folder / "tokenizer.json", {
        "version": "1.0",
        "added_tokens": [{"id": eot, "content": EOT, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, by_bytes]},
        "post_processor": {
            "type": "TemplateProcessing", "single": [begin, texts[0]], "pair": [begin, *texts],
            "special_tokens": {EOT: {"id": EOT, "ids": [eot], "tokens": [EOT]}}},
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "ignore_merges": True,  # a word that is a token needs no merges, as in tiktoken
            "vocab": {shown[token]: i for token, i in ranks.items()},
            "merges": [" ".join(shown[part] for part in pair) for pair in pairs if pair]}})
    q.save_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT),
        "split_special_tokens": True,  # <|endoftext|> in a text is text
        "padding_side": "left",
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False})


def byte_characters():
    """{byte: the character that stands for it in a tokenizer.json}: itself where it can be seen,
    else one from 256 on."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    found = {byte: chr(byte) for byte in visible}
    for byte in range(256):
        if byte not in found:
            found[byte] = chr(256 + len(found) - len(visible))
    return found


CHARACTERS = byte_characters()


def last_merge(token, ranks):
    """The two tokens that byte-pair encoding merges last where it makes `token` of bytes; None
    where it does not, as it merges them in another way."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [left + right for left, right in zip(parts, parts[1:])]
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            return None
        at = pairs.index(best)
        parts[at:at + 2] = [best]
    return parts
