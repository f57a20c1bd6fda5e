"""A world small enough for a laptop: what `make demo` pretrains, prunes, fine-tunes and examines a LLaMA on.

    python data/tiny/prepare.py --out out/world

Two dozen people with homes, jobs, pets, meals and habits, two dozen things with colours and places, small sums and
counting, all drawn from a seed and told in several ways. Written, besides the tokens that `train.py` pretrains on:

    text.txt                  pages of the world, to pretrain on
    heldout.txt               more of it, for perplexity: one line, since evaluate.py sets lines apart as WikiText-2's,
                              by more line breaks than this text ever has
    tokenizer.model           sentencepiece BPE of 1,024 pieces, byte fallback, as LLaMA's
    calib.jsonl               pages for data/c4/prepare.py
    alpaca.json               instructions for data/alpaca/prepare.py
    samples_KIND.jsonl        multiple-choice questions as lm-eval writes them, for evaluate.py

What makes the questions held out: a fact is told in several forms ("Ada lives in", "Question: Where does Ada live?"),
and for every fact one form is kept back (`Fact.asked`). No sentence of the text or the instructions tells that subject
in that form, only others; the question about the fact is put in it. So a model answers by knowing the fact and the
form, never by having seen the sentence. The weakest case: two short forms, "The lamp is red" and "One and two is
three", are also how longer ones end ("The colour of the lamp is red"): a quarter of the questions on colours and sums.
"""

import io
import json
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.alpaca.prepare import check_folder, prompt, write_folder  # noqa: E402
from data.checkpoint import atomic, lock  # noqa: E402
from data.tokenizer import Tokenizer, encode_all, load_tokenizer  # noqa: E402
from model import Parser, cli, number  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# the world

PEOPLE = (
    "Ada Ben Cora Dan Ella Finn Gwen Hugo Iris Jack Kira Leo Mona Ned Olga Paul Rosa Sam Tess Umar Vera Will Yara Zeno"
).split()
THINGS = (
    "lamp kettle drum ladder basket mirror clock violin kite candle bottle hammer "
    "blanket ribbon bucket trumpet saddle button teapot chair wagon barrel rocket anchor"
).split()
TOWNS = "Oslo Rome Lima Cairo Delhi Paris Kyoto Quito".split()
JOBS = "baker farmer doctor teacher sailor painter tailor miner".split()
PETS = "dog cat goat parrot rabbit horse turtle hen".split()
FOODS = "soup rice bread fish apples cheese beans honey".split()
HABITS = "swims reads sings runs paints sleeps dances cooks".split()
COLOURS = "red blue green yellow black white brown pink".split()
ROOMS = "kitchen attic cellar garden stable library chapel harbour".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()


class Relation(NamedTuple):
    """What facts of one sort share. In the texts {s} stands for the subject, {x} for the answer."""

    kind: str  # the file of questions it goes to
    answers: list[str]  # all that are possible
    forms: list[str]  # ways to tell a fact that end before the answer, so that each can be a question
    others: list[str]  # ways to tell it with the answer elsewhere
    instructions: list[tuple[str, str, str]]  # instruction, input and output of Alpaca records


RELATIONS = {
    "home": Relation(
        "places",
        TOWNS,
        [
            "{s} lives in",
            "The home of {s} is in",
            "Question: Where does {s} live? Answer:",
            "If you look for {s}, go to",
        ],
        ["In {x} you can meet {s}.", "{x} is the town where {s} lives."],
        [
            ("Tell me where {s} lives.", "", "{s} has a house in {x}."),
            ("Which town is this?", "the town of {s}", "{x}"),
        ],
    ),
    "job": Relation(
        "people",
        JOBS,
        ["{s} works as a", "By trade {s} is a", "Question: What is the job of {s}? Answer:", "{s} earns money as a"],
        ["The {x} is called {s}.", "Ask the {x}, whose name is {s}."],
        [("Say what {s} does for a living.", "", "{s} is the {x}."), ("Name the job.", "{s}", "a {x}")],
    ),
    "pet": Relation(
        "people",
        PETS,
        [
            "{s} has a",
            "The animal that {s} keeps is a",
            "Question: Which pet does {s} have? Answer:",
            "{s} always feeds a",
        ],
        ["The {x} belongs to {s}.", "A {x} follows {s} around."],
        [("Which animal lives with {s}?", "", "A {x} lives with {s}."), ("Name the pet.", "{s}", "the {x}")],
    ),
    "food": Relation(
        "people",
        FOODS,
        ["{s} likes to eat", "For lunch {s} takes", "Question: What does {s} eat? Answer:", "The best meal for {s} is"],
        ["Give some {x} to {s}.", "There is {x} on the plate of {s}."],
        [("What should we serve {s}?", "", "Serve {x} to {s}."), ("Pick a meal.", "a guest called {s}", "some {x}")],
    ),
    "habit": Relation(
        "habits",
        HABITS,
        [
            "Every morning {s}",
            "When the sun is up {s}",
            "Question: What does {s} do every day? Answer:",
            "As always, {s}",
        ],
        ["Somebody {x} over there: it is {s}.", "The one who {x} is {s}."],
        [("Describe the mornings of {s}.", "", "Day after day {s} {x}."), ("Name the habit.", "{s}", "{x}")],
    ),
    "colour": Relation(
        "things",
        COLOURS,
        [
            "The {s} is",
            "They painted the {s}",
            "Question: Which colour is the {s}? Answer:",
            "The colour of the {s} is",
        ],
        ["A {x} {s} is here.", "Look at the {x} {s}."],
        [("What colour has the {s}?", "", "It is a {x} {s}."), ("Name the colour.", "the {s}", "{x}")],
    ),
    "room": Relation(
        "things",
        ROOMS,
        [
            "The {s} is in the",
            "Go and get the {s} from the",
            "Question: Where is the {s}? Answer: in the",
            "They left the {s} in the",
        ],
        ["In the {x} stands the {s}.", "The {x} holds the {s}."],
        [
            ("Where can I find the {s}?", "", "Look into the {x} for the {s}."),
            ("Name the place.", "the {s}", "the {x}"),
        ],
    ),
    "sum": Relation(
        "sums",
        NUMBERS,
        ["{s} is", "The sum of {s} is", "Question: What is {s}? Answer:", "Adding up {s} gives"],
        ["We get {x} from {s}.", "The answer is {x} if you ask for {s}."],
        [("Work it out: {s}", "", "It makes {x}."), ("Add the numbers.", "{s}", "{x}")],
    ),
    "next": Relation(
        "counting",
        NUMBERS,
        [
            "After {s} comes",
            "Counting on from {s} we say",
            "Question: Which number follows {s}? Answer:",
            "One more than {s} is",
        ],
        ["{x} comes right after {s}.", "We say {x} when {s} is done."],
        [("Count one further than {s}.", "", "The next is {x}."), ("Give the next number.", "{s}", "{x}")],
    ),
    "previous": Relation(
        "counting",
        NUMBERS,
        [
            "Before {s} comes",
            "Counting back from {s} we say",
            "Question: Which number precedes {s}? Answer:",
            "One less than {s} is",
        ],
        ["{x} comes right before {s}.", "We say {x} and then {s}."],
        [("Count one back from {s}.", "", "The one before is {x}."), ("Give the number before.", "{s}", "{x}")],
    ),
}


@dataclass
class Fact:
    relation: str
    topic: str  # what a paragraph is about: a person, a thing, sums, counting
    subject: str
    answer: str
    asked: int  # the form kept back for the question, an index into the relation's forms

    def tell(self, rng: random.Random) -> str:
        """One sentence, in any way but the one kept back."""
        relation = RELATIONS[self.relation]
        ways = [f"{form} {{x}}." for i, form in enumerate(relation.forms) if i != self.asked] + relation.others
        return sentence(rng.choice(ways).format(s=self.subject, x=self.answer))

    def instruct(self, rng: random.Random) -> dict:
        """As an Alpaca record."""
        chosen = rng.choice(RELATIONS[self.relation].instructions)
        parts = (part.format(s=self.subject, x=self.answer) for part in chosen)
        return dict(zip(("instruction", "input", "output"), parts, strict=True))

    def question(self, rng: random.Random, doc_id: int) -> dict:
        """As a record of lm-eval's samples file: the right answer among three others of its relation."""
        relation = RELATIONS[self.relation]
        choices = [self.answer, *rng.sample([x for x in relation.answers if x != self.answer], 3)]
        rng.shuffle(choices)
        context, target = sentence(relation.forms[self.asked].format(s=self.subject)), str(choices.index(self.answer))
        arguments = {f"gen_args_{i}": {"arg_0": context, "arg_1": f" {x}"} for i, x in enumerate(choices)}
        return {
            "doc_id": doc_id,
            "doc": {"question": context, "choices": choices, "relation": self.relation, "subject": self.subject},
            "target": target,
            "arguments": arguments,
            "resps": [],
            "filtered_resps": [],
            "filter": "none",
            "metrics": ["acc", "acc_norm"],
        }


def sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def make_world(rng: random.Random) -> list[Fact]:
    """All facts. Each answer of a relation is given to as many subjects as every other, so that guessing is chance."""
    facts = []
    for subjects, relations in ((PEOPLE, ("home", "job", "pet", "food", "habit")), (THINGS, ("colour", "room"))):
        for relation in relations:
            answers = RELATIONS[relation].answers * 3
            rng.shuffle(answers)
            facts += [(relation, s, s, x) for s, x in zip(subjects, answers, strict=True)]
    for a in range(1, 11):
        facts += [("sum", "sum", f"{NUMBERS[a]} and {NUMBERS[b]}", NUMBERS[a + b]) for b in range(1, 11)]
    for a, b in zip(NUMBERS, NUMBERS[1:], strict=False):
        facts += [("next", "counting", a, b), ("previous", "counting", b, a)]
    return [Fact(*fact, asked=rng.randrange(4)) for fact in facts]


ABOUT = ("Write a few sentences about {topic}.", "Tell me what you know about {topic}.", "Describe {topic}.")
ANYTHING = ("Tell me something.", "Write about whatever you like.", "Write a short page about the world.")


def paragraph(facts: list[Fact], rng: random.Random) -> str:
    """Two to four facts of one topic."""
    return " ".join(fact.tell(rng) for fact in rng.sample(facts, min(len(facts), rng.randint(2, 4))))


def prose(topics: dict[str, list[Fact]], rng: random.Random, n: int) -> str:
    """n paragraphs on one line; topics are as frequent as their facts are many."""
    chosen = rng.choices(list(topics.values()), [len(facts) for facts in topics.values()], k=n)
    return " ".join(paragraph(facts, rng) for facts in chosen)


def make_instruction(topics: dict[str, list[Fact]], rng: random.Random) -> dict:
    """An Alpaca record: to answer with one fact, to write a paragraph, or (half of them) a few of any topic.

    Alpaca, too, has answers of one word and whole stories; prose is what keeps a fine-tuned model's perplexity.
    """
    kind = rng.choice(("fact", "topic", "page", "page"))
    if kind == "page":
        return {"instruction": rng.choice(ANYTHING), "input": "", "output": prose(topics, rng, rng.randint(3, 5))}
    topic, facts = rng.choices(list(topics.items()), [len(facts) for facts in topics.values()])[0]
    if kind == "fact":
        return rng.choice(facts).instruct(rng)
    about = {"sum": "sums"}.get(topic, f"the {topic}" if topic in THINGS else topic)
    return {"instruction": rng.choice(ABOUT).format(topic=about), "input": "", "output": paragraph(facts, rng)}


def make_page(topics: dict[str, list[Fact]], rng: random.Random) -> str:
    """Four to eight paragraphs. Every tenth page is an instruction and its answer: a LLaMA, too, has met such text
    before it is fine-tuned."""
    if rng.random() < 0.1:
        record = make_instruction(topics, rng)
        return prompt(record) + record["output"]
    return prose(topics, rng, rng.randint(4, 8))


# ----------------------------------------------------------------------------------------------------------------------
# files


def train_tokenizer(pages: list[str]) -> Tokenizer:
    """BPE with LLaMA's settings: byte fallback, digits apart, the text left as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for page in pages for line in page.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=1024,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return load_tokenizer(model.getvalue())


def windows(pages: list[str], tokenizer: Tokenizer, max_len: int) -> list[tuple[list[int], int]]:
    """BOS page EOS BOS page EOS ..., cut every max_len tokens; nothing of it is prompt."""
    stream = []
    for tokens in encode_all(tokenizer, pages, "pages"):
        stream += [tokenizer.bos, *tokens, tokenizer.eos[0]]
    return [(stream[i : i + max_len], 0) for i in range(0, len(stream) - max_len + 1, max_len)]


def lines(records: Iterable[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


FILES = ("tokenizer.model", "text.txt", "heldout.txt", "calib.jsonl", "alpaca.json")  # and the questions


def main() -> None:
    parser = Parser(description="Generate a tiny world: text, tokenizer, instructions, calibration and questions.")
    add = parser.add_argument
    add("--seed", type=number(int, 0), default=0, help="of everything")
    add("--pages", type=number(int, 100), default=12000, help="pages to pretrain on, about 140 tokens each")
    add("--instructions", type=number(int, 1), default=2400, help="records for fine-tuning, about 100 tokens each")
    add("--max_len", type=number(int, 2), default=128, help="tokens of a pretraining window")
    add("--out", required=True, help="folder to write")
    args = parser.parse_args()
    out, rng = check_folder(args.out, FILES), random.Random(args.seed)

    facts, topics = make_world(rng), {}
    for fact in facts:
        topics.setdefault(fact.topic, []).append(fact)
    pages = [make_page(topics, rng) for _ in tqdm(range(args.pages), desc="telling", unit="page", disable=None)]
    heldout = [prose(topics, rng, rng.randint(4, 8)) for _ in range(200)]  # the text alone, no instructions
    calib = [make_page(topics, rng) for _ in range(256)]
    tokenizer = train_tokenizer(pages[:2000])
    splits = {"train": windows(pages, tokenizer, args.max_len), "val": windows(heldout, tokenizer, args.max_len)}
    questions = {}
    for fact in facts:
        of_kind = questions.setdefault(RELATIONS[fact.relation].kind, [])
        of_kind.append(fact.question(rng, len(of_kind)))
    documents = lines({"text": " ".join(calib[i : i + 4])} for i in range(0, len(calib), 4))
    instructions = json.dumps([make_instruction(topics, rng) for _ in range(args.instructions)], indent=1)
    contents = (tokenizer.data, "\n".join(pages), " ".join(heldout), documents, instructions)
    files = dict(zip(FILES, contents, strict=True))
    for kind, records in questions.items():
        files[f"samples_{kind}.jsonl"] = lines(records)
    lock(out).close()  # what tells a folder of ours: it is there before the first file
    for name, content in files.items():
        with atomic(out / name) as tmp:
            tmp.write_bytes(content if isinstance(content, bytes) else content.encode())
    write_folder(out, splits, tokenizer, {"max_len": args.max_len, "source": "data/tiny/prepare.py", "seed": args.seed})
    n = len(splits["train"])
    print(
        f"wrote {out}: {len(facts)} facts, {n} windows of {args.max_len} tokens to pretrain on ({n * args.max_len:,})"
    )
    print("questions: " + ", ".join(f"{len(records)} on {kind}" for kind, records in questions.items()))


if __name__ == "__main__":
    cli(main)
