"""Saying a caption in other words that mean the same, the way strangers write prompts.

Each rule is a regular expression for whole words, ways to say them otherwise, divided by "|" ({} is what was
there), and how often to do so. All are true of every picture that the words were true of: no
"cloudless" by day, when a clear sky may have a cloud, no "village" for high buildings, no colour of a place.
Openings and closings say nothing of the picture.
"""

import random
import re
import string

from ldm.postcards import captions, phrases, vocabulary
from ldm.postcards.scene import Scene

# The singular, the plural; as in phrases.py.
NOUNS = {
    "house": ("hut|cabin|bungalow|dwelling", "huts|cabins|bungalows|dwellings"),
    "castle": (
        "palace|fort|citadel|stronghold|chateau|fairytale castle|medieval castle",
        "palaces|forts|citadels|strongholds|chateaus|fairytale castles|medieval castles",
    ),
    "car": ("vehicle|motorcar|motor car|toy car", "vehicles|motorcars|motor cars|toy cars"),
    "tree": ("deciduous tree|broadleaf tree|round leafy tree", "deciduous trees|broadleaf trees|leafy trees"),
    "flower": ("wildflower|wild flower|flowering plant", "wildflowers|wild flowers|flowering plants"),
    "mushroom": ("fungus|toad stool|spotted mushroom", "fungi|toad stools|spotted mushrooms"),
    "cat": ("pussycat|puss|feline|kitty cat|house cat", "pussycats|felines|kitty cats|house cats"),
    "snowman": ("snow-man|snowperson", "snow-men|snowpeople"),
    "lighthouse": ("light-house|light tower|beacon|beacon tower", "light-houses|light towers|beacons"),
    "tent": ("camp tent|camping-tent|hiking tent", "camp tents|camping-tents|hiking tents"),
    "sailboat": (
        "sailing ship|sail boat|sail-boat|dinghy|sailing vessel|vessel|sailing yacht",
        "sailing ships|sail boats|sail-boats|dinghies|sailing vessels|vessels|sailing yachts",
    ),
    "duck": ("ducky|rubber ducky|toy duck|waterbird", "duckies|rubber duckies|toy ducks|waterbirds"),
    "balloon": (
        "hot-air balloon|air balloon|hot air balloon",
        "hot-air balloons|air balloons|hot air balloons",
    ),
    "rocket": (
        "space ship|spacecraft|rocket ship|rocketship|starship",
        "space ships|spacecraft|rocket ships|rocketships|starships",
    ),
}
COLOURS = {
    "red|crimson|scarlet": "ruby|ruby red|cherry red|vermilion",
    "orange": "tangerine",
    "yellow": "golden|gold|golden yellow|lemon yellow",
    "green": "emerald|emerald green|leaf green",
    "blue": "azure|royal blue|cobalt blue|sapphire blue",
    "purple|violet": "violet|lilac|amethyst|deep purple",
    "pink": "rosy|rose pink|rose-coloured|candy pink",
    "white": "snow-white|pure white|ivory white|snow white",
}
COLOURED = "{}-coloured|{}-colored|{} coloured|{} colored|{} color|{} colour"  # of all
NUMBERS = {
    "two|2|a pair of": "a couple of|couple of|two|2|a pair of|a duo of",
    "three|3": "a trio of|a group of three|three|3|a set of three",
}
TIMES = {
    "at dawn|at sunrise|at daybreak|in the early morning|in the morning": "at first light|"
    "early in the morning|at the break of day|at sunup|in the morning light|at dawn|in the morning",
    "during the day|by day|in daylight|in the daytime": "in the daylight|in broad daylight|at daytime|"
    "in the day time|in the afternoon|in the day",
    "at noon|at midday": "at high noon|at noontime|around noon|in the middle of the day|at lunchtime",
    "at sunset|at dusk|in the evening light|in the evening": "at sundown|at twilight|in the twilight|"
    "at nightfall|in the late evening|at the end of the day|at dusk|at sunset",
    "at night|by night|at midnight|in the night|late at night": "during the night|at nighttime|at night time|"
    "in the dark|in the darkness|after dark|in the middle of the night|in the dead of night",
    "on a clear morning": "on a fine morning|on a bright morning|on a cloudless morning",
    "as the sun rises": "while the sun rises|with the sun rising|when the sun comes up|under the rising sun",
    "on a sunny day|in the sunshine": "in the sun|in the sunlight|on a bright sunny day|under the sun|"
    "on a sunny afternoon|in bright sunshine|on a day with sunshine",
    "on a clear day": "on a fine day|on a bright day|on a day with clear skies",
    "on a clear evening": "on a fine evening|on a cloudless evening",
    "as the sun sets": "while the sun sets|with the setting sun|when the sun goes down|under the setting sun",
    "under the stars|on a starry night": "under a starry sky|with stars in the sky|"
    "beneath the stars|under a sky full of stars|in the starlight|in a starry night|on a night full of stars",
    "in the moonlight|under the moon": "by moonlight|beneath the moon|on a moonlit night|"
    "under a crescent moon|with the moon in the sky|under the moonlight",
    "on a clear night": "on a cloudless night|at night under a clear sky",
}
WEATHERS = {
    "under a clear sky|in clear weather|with a clear sky": "in fine weather|in good weather|"
    "under clear skies|beneath a clear sky|in fair weather|in nice weather",
    "under a cloudy sky|under a overcast sky|in cloudy weather|under grey clouds": "beneath a cloudy sky|"
    "under a gray sky|in gloomy weather|with clouds in the sky|under gray clouds|with a cloudy sky|"
    "in overcast weather|in dull weather",
    "in the rain|with rain falling|while it rains|in rainy weather": "in the pouring rain|in a rain shower|"
    "in the drizzle|in a drizzle|while it is raining|when it rains|as it rains|"
    "during a shower|in falling rain",
    "in the snow|with snow falling|while it snows|in winter|as snow falls": "during snowfall|in falling snow|"
    "while it is snowing|when it snows|as it snows|in snowy weather|with snowflakes falling|in a snowfall|"
    "in the wintertime",
}
# Only where the word stands alone between commas.
TAGS = {
    "dawn|sunrise|early morning": "morning|daybreak|first light|at dawn",
    "day|daytime": "daylight|midday|day time|afternoon",
    "sunset|dusk|evening": "twilight|sundown|nightfall|evening time",
    "night|nighttime": "night time|at night|dark night|darkness",
    "clear|clear sky": "clear skies|fine weather|fair weather",
    "cloudy|clouds|overcast": "cloudy sky|cloudy weather|gray sky|gloomy|gloomy weather",
    "rain|rainy": "raining|rainfall|rain shower|drizzle|rainy weather|showers",
    "snow|snowy|winter": "snowing|snowfall|falling snow|snowy weather|wintertime",
}
POSITIONS = {
    "in the middle of": "in the midst of",
    "in the middle|in the center|in the centre": "in the middle of the picture|in the center of the image|"
    "at the center|at the centre|in the very middle",
    **{
        f"to the {side} of|{side} of|on the {side} of": f"on the {side} side of|at the {side} of|"
        f"to the {side} side of|on the {side}-hand side of|at the {side} side of"
        for side in ("left", "right")
    },
    **{
        f"on the {side} side|on the {side}|at the {side}": f"on the {side}-hand side|on the {side} hand side|"
        f"to the {side}|at the {side} side|on the {side} of the picture|on the {side} side of the image"
        for side in ("left", "right")
    },
    "flying above|floating over": "soaring above|hovering over|in the sky above|in the air above|flying over|"
    "floating above",
    "above|over": "high above|high over|up above|in the sky above|in the air over",
    "below|under|beneath|underneath": "down below|below|under|beneath|underneath",
    "next to|beside": "alongside|close to",
    "near": "close to|not far from",
}
PLACES = {
    "on the sea": "on the water|upon the sea|at sea",
    "on the open sea|on the waves": "on the open water|on the water|on the open ocean",
    "out at sea|at sea": "out at sea",
    "seascape": "sea view|ocean view|ocean scene",
    "sea": "ocean",
    "sandy beach": "sandy shore|sandy coast|beach of sand",
    "at the seaside": "by the seaside|on the coast|at the coast",
    "beach|shore": "seashore|coast|seaside|sandy beach|coastline",
    "grassy field": "grass field|field of grass|grassland",
    "meadow": "pasture|grassland|prairie|field",
    "countryside": "open countryside|rural landscape|rural area",
    "green hills": "rolling green hills|grassy hills",
    "hills": "rolling hills|gentle hills",
    "mountain landscape": "mountain scenery|alpine landscape|mountainous landscape",
    "mountains|alps": "mountain peaks|peaks|snow-capped mountains|high mountains|highlands|snow-capped peaks",
    "pine forest": "fir forest|evergreen forest|coniferous forest|pine wood",
    "forest": "woodland|wood",
    "woods": "woodland|woodlands",
    "desert dunes|sand dunes|dunes": "sandy dunes|dunes of sand|desert sands",
    "desert": "sandy desert|arid desert|dry desert|desert landscape",
    "in the city": "downtown|in the big city|in an urban area|in town",
    "city street": "urban street|street in the city|town street|city road",
    "city skyline|skyline": "urban skyline|cityscape|skyline of a city",
    "city|town": "metropolis|big city|urban area",
}
# A participle, or nothing at all.
VERBS = {
    "stands|stand": "standing|",
    "floats|hovers|float|hover": "floating|hovering|",
    "flies|fly": "flying|soaring",
    "is parked|are parked": "parked|",
    "waits|wait": "waiting|",
    "grows|grow": "growing|",
    "sits|sit": "sitting|seated|",
    "sails|drifts|sail|drift": "sailing|drifting|",
    "swims|swim": "swimming|",
    "is|are": "can be seen|",
}
ADJECTIVES = {
    "big|large": "huge|giant|great",
    "little": "small|tiny",
    "cute": "adorable|sweet",
    "pretty|lovely|nice": "charming|fine",
    "beautiful": "gorgeous|stunning",
    "bright": "vivid",
    "simple": "plain",
    "quiet|peaceful|calm": "tranquil|serene",
    "wide": "vast|broad",
    "cloudy|overcast|grey": "gray|gloomy",
    "rainy|wet": "drizzly|showery",
    "snowy|wintry": "winter|frosty",
    "snow-covered": "snow covered|snow-clad",
    "hat": "top hat",
    "hats": "top hats",
    "scarf": "warm scarf|woolly scarf",
    "scarves": "scarfs|woolly scarves",
    "wearing": "dressed in",
}
OPENINGS = (
    "draw|please draw|draw me|can you draw|show me|i want|i would like|paint|generate|i want a picture of|"
    "create a image of|generate a image of|make a picture of|a cute drawing of|flat illustration of|"
    "a flat illustration of|poster of|a poster of|a artwork of|artwork of|a photo of|photo of|picture of|"
    "image of|drawing of|illustration of|painting of|postcard of|a cartoon of|cartoon of|vector art of|"
    "clipart of"
)
CLOSINGS = (
    "flat design|vector art|vector illustration|flat illustration|illustration|digital art|highly detailed|"
    "high quality|best quality|4k|8k|hd|masterpiece|postcard|poster|cartoon style|cartoon|minimalist|clipart|"
    "children's book illustration|trending on artstation"
)


def reword(text: str, rng: random.Random) -> str:
    """A caption in other words, or in another form, with the same meaning; some come back as they were."""
    plain = re.sub(r"\ban ", "a ", text.lower().rstrip("."))
    plain = _frame(_reorder(plain, rng), rng)
    plain = _RULES.sub(lambda match: _replace(match, rng), plain)
    if rng.random() < 0.08:
        plain = plain.replace(",", "")
    if rng.random() < 0.1:
        plain = re.sub(r"\b(?:a|the) ", "", plain)
    return _dress(captions.with_articles(" ".join(plain.split()).replace(" ,", ",")), rng)


def names_colours(scene: Scene, text: str) -> bool:
    """Whether a caption of the scene, reworded or not, says what colour each thing is.

    A green meadow passes for a green thing: seldom, as there must be one and its colour left unsaid.
    """
    return all(_SAID[group.colour].search(text.lower()) for group in scene.groups)


def words() -> list[str]:
    """Every word that a rewording can add to those of `captions.words`, lower-case, sorted."""
    said = [
        new.replace("{}", old)
        for pattern, replacements, _ in _TABLE
        for new in replacements.split("|")
        for old in (pattern.split("|") if "{}" in new else [""])
    ]
    found = {word for said_so in (*said, CLOSINGS) for word in captions.split(said_so)}
    return sorted(found - set(captions.words()))


def _either(alternatives: str) -> str:
    return "|".join(sorted(alternatives.split("|"), key=len, reverse=True))


def _noun_rules() -> list[tuple[str, str, float]]:
    # "blooms" is also what a flower does.
    return [
        ("|".join(pair[several] for pair in phrases.NOUNS[kind] if pair[0] != "bloom"), both[several], 0.45)
        for kind, both in NOUNS.items()
        for several in (0, 1)
    ]


_SAID = {
    colour: re.compile(rf"\b(?:{known}|{new})\b")
    for colour, (known, new) in zip(vocabulary.COLOURS, COLOURS.items(), strict=True)
}
_FIRST = "|".join((*phrases.OPENINGS, *phrases.EXISTS_ONE, *phrases.EXISTS_MANY)).replace("an ", "a ")
_WHEN = _either("|".join((*TIMES, *WEATHERS)))
_PREPOSITION = r"(?:on|at|in|under|by|with|while|as|during|late|over|above|near|among|out)\b"
# A thing after its article or number.
_THING = (
    rf"(?:(?:{'|'.join(phrases.ADJECTIVES)}) )?(?:(?:{'|'.join(COLOURS)}) )?"
    rf"(?:{'|'.join(noun for pairs in phrases.NOUNS.values() for pair in pairs for noun in pair)})\b"
)
# The first that matches counts; within a rule the longest. No pattern has a group: `_replace` counts them.
_TABLE = [
    (rf"^(?:{_either(_FIRST)})", OPENINGS, 0.6),
    *((pattern, new, 0.4) for table in (TIMES, WEATHERS) for pattern, new in table.items()),
    *((rf"(?<=, )(?:{_either(pattern)})(?=,|$)", new, 0.4) for pattern, new in TAGS.items()),
    *((_either(pattern), new, 0.4) for table in (POSITIONS, PLACES) for pattern, new in table.items()),
    (rf"a(?= {_THING})", "the|the|one|a single", 0.15),
    (rf"with(?= (?:(?:a|{'|'.join(NUMBERS)}) )?{_THING})", "featuring|containing|showing", 0.25),
    *((pattern, new, 0.5) for pattern, new in NUMBERS.items()),
    *_noun_rules(),
    *((pattern, f"{new}|{new}|{COLOURED}", 0.35) for pattern, new in COLOURS.items()),
    *((pattern, new, 0.4) for table in (VERBS, ADJECTIVES) for pattern, new in table.items()),
]
_RULES = re.compile(rf"(?<![\w-])(?:{'|'.join(f'({pattern})' for pattern, _, _ in _TABLE)})(?![\w-])")
_WAYS = [(tuple(replacements.split("|")), share) for _, replacements, share in _TABLE]
_STATEMENT = re.compile(rf"^(?:{_PREPOSITION}|{_FIRST})|\b(?:{'|'.join(VERBS)}|blooms?)\b")
_FRONT = re.compile(rf"({_PREPOSITION}[^,]*), ([^,]+)")
_BACK = re.compile(rf"(?!{_PREPOSITION}|{_FIRST})([^,]+)(?<! is)(?<! are)(?<! late) ({_WHEN})")
_GAP = re.compile(rf"(?<=\w)(?<! is)(?<! are)(?<! late) (?=(?:{_WHEN})(?![\w-]))")


def _replace(match: re.Match[str], rng: random.Random) -> str:
    ways, share = _WAYS[(match.lastindex or 1) - 1]
    return rng.choice(ways).replace("{}", match[0]) if rng.random() < share else match[0]


def _reorder(plain: str, rng: random.Random) -> str:
    """ "at night, a red car" <-> "a red car at night", or a comma before each circumstance."""
    style = rng.random()
    # "on the left" must stay with its thing.
    front = _FRONT.fullmatch(plain)
    if style < 0.3 and front and not re.search(r"\b(?:left|right|middle|center|centre)\b", front[1]):
        return f"{front[2]} {front[1]}"
    if style < 0.15 and (back := _BACK.fullmatch(plain)):
        return f"{back[2]}, {back[1]}"
    return _GAP.sub(", ", plain) if style > 0.92 else plain


def _frame(plain: str, rng: random.Random) -> str:
    """With "draw" or the like before it, if it is no statement, and quality tags after it."""
    if rng.random() < 0.12 and not _STATEMENT.search(plain):
        plain = f"{rng.choice(OPENINGS.split('|'))} {plain}"
    if rng.random() < 0.12:
        plain = ", ".join([plain, *rng.sample(CLOSINGS.split("|"), rng.choice((1, 1, 2)))])
    return plain


def _dress(plain: str, rng: random.Random) -> str:
    """Capitals and a last mark, as they come."""
    style = rng.random()
    if style < 0.15:
        return plain[:1].upper() + plain[1:] + (".", "!", "")[int(style * 20)]
    if style < 0.19:
        return string.capwords(plain) if style < 0.18 else plain.upper()
    return plain + (".", "!")[style < 0.2] if style < 0.22 else plain
