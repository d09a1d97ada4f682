"""The words captions are made of. A slot, {}, takes an adjective with its space, or nothing.

Every phrase is true of every picture it can be said of; adjectives of size and mood say nothing that
a model must know. Write "a" everywhere: captions.py turns it into "an" where needed.
"""

# Singular and plural; the first is the plain name.
NOUNS = {
    "house": (("house", "houses"), ("cottage", "cottages"), ("home", "homes")),
    "castle": (("castle", "castles"), ("fortress", "fortresses")),
    "car": (("car", "cars"), ("automobile", "automobiles"), ("auto", "autos")),
    "tree": (("tree", "trees"), ("round tree", "round trees"), ("leafy tree", "leafy trees")),
    "flower": (("flower", "flowers"), ("blossom", "blossoms"), ("bloom", "blooms")),
    "mushroom": (("mushroom", "mushrooms"), ("toadstool", "toadstools")),
    "cat": (("cat", "cats"), ("kitten", "kittens"), ("kitty", "kitties")),
    "snowman": (("snowman", "snowmen"), ("snow man", "snow men")),
    "lighthouse": (("lighthouse", "lighthouses"), ("light house", "light houses")),
    "tent": (("tent", "tents"), ("camping tent", "camping tents")),
    "sailboat": (
        ("sailboat", "sailboats"),
        ("boat", "boats"),
        ("sailing boat", "sailing boats"),
        ("yacht", "yachts"),
        ("ship", "ships"),
    ),
    "duck": (("duck", "ducks"), ("rubber duck", "rubber ducks"), ("duckling", "ducklings")),
    "balloon": (("balloon", "balloons"), ("hot air balloon", "hot air balloons")),
    "rocket": (("rocket", "rockets"), ("spaceship", "spaceships"), ("space rocket", "space rockets")),
}
COLOUR_WORDS = {
    "red": ("red", "red", "red", "red", "crimson", "scarlet"),
    "purple": ("purple", "purple", "purple", "violet"),
}
NUMBERS = {2: ("two", "two", "two", "2", "a pair of"), 3: ("three", "three", "three", "3")}
ADJECTIVES = (
    *("big", "large", "lovely", "pretty", "beautiful", "nice", "bright", "cute"),
    *("little", "simple"),
)

# A snowman is white: its colour is that of its hat and scarf.
SNOWMAN = (
    "with a {} scarf",
    "in a {} hat",
    "with a {} hat and scarf",
    "wearing a {} scarf",
    "wearing a {} hat and a {} scarf",
)
SNOWMEN = ("with {} scarves", "in {} hats", "with {} hats and scarves", "wearing {} scarves")

# What one does, what several do.
VERBS = {
    "ground": (("stands", "stand"), ("is", "are")),
    "air": (("floats", "float"), ("flies", "fly"), ("hovers", "hover")),
}
KIND_VERBS = {
    "car": (("is parked", "are parked"), ("waits", "wait")),
    "tree": (("grows", "grow"), ("stands", "stand")),
    "flower": (("grows", "grow"), ("blooms", "bloom")),
    "mushroom": (("grows", "grow"),),
    "cat": (("sits", "sit"), ("waits", "wait")),
    "sailboat": (("sails", "sail"), ("floats", "float"), ("drifts", "drift")),
    "duck": (("swims", "swim"), ("floats", "float")),
}

# Of place: how things are in it, how things in the air are over it, and itself.
PLACES = {
    "sea": ("on the {}sea", "on a {}sea", "at sea", "on the {}ocean", "on the open sea", "on the waves"),
    "beach": ("on the {}beach", "on a {}beach", "at the {}beach", "by the {}shore", "at the seaside"),
    "meadow": (
        *("in a {}meadow", "in the {}meadow", "in a {}grassy field", "on {}green hills"),
        *("in the {}countryside", "in a {}field", "on the {}hills"),
    ),
    "mountains": (
        *("in the {}mountains", "in front of {}mountains", "near the {}mountains"),
        *("in the {}alps", "in a {}mountain landscape"),
    ),
    "forest": ("in a {}forest", "in the {}forest", "in the {}woods", "in front of a {}pine forest"),
    "desert": ("in the {}desert", "in a {}desert", "among {}dunes", "in the {}sand dunes"),
    "city": (
        *("in the {}city", "in a {}city", "in a {}town", "on a {}city street"),
        *("in front of a {}skyline", "in front of the {}city skyline"),
    ),
}
IN_THE_SEA = ("in the {}sea", "out at sea", "in the middle of the {}ocean", "in a {}sea")
OVER = {
    "sea": ("over the {}sea", "above the {}ocean", "over a {}sea", "above the waves", "at sea"),
    "beach": ("over the {}beach", "above a {}beach", "over the {}shore", "at the {}beach"),
    "meadow": (
        "over a {}meadow",
        "above {}green hills",
        "over the {}hills",
        "over the {}countryside",
        "in a {}meadow",
    ),
    "mountains": ("over the {}mountains", "above the {}mountains", "in the {}mountains", "over the {}alps"),
    "forest": ("over a {}forest", "above the {}forest", "over the {}woods", "in a {}forest"),
    "desert": ("over the {}desert", "above the {}dunes", "over a {}desert", "in the {}desert"),
    "city": ("over the {}city", "above a {}city", "over a {}town", "in the {}city"),
}
SCENERY = {
    "sea": ("the {}sea", "a {}sea", "the {}ocean", "a {}seascape", "the open sea"),
    "beach": ("a {}beach", "the {}beach", "a {}sandy beach", "the seaside", "a {}shore"),
    "meadow": (
        "a {}meadow",
        "the {}meadow",
        "{}green hills",
        "the {}countryside",
        "a {}grassy field",
        "{}hills",
    ),
    "mountains": ("{}mountains", "the {}mountains", "a {}mountain landscape", "the {}alps"),
    "forest": ("a {}forest", "the {}woods", "a {}pine forest"),
    "desert": ("a {}desert", "the {}desert", "{}desert dunes"),
    "city": ("a {}city", "the {}city", "a {}city skyline", "a {}town"),
}
GREENERY = ("green", "grassy")  # never under snow
PLACE_ADJECTIVES = ("quiet", "peaceful", "wide", "beautiful", "calm", "lovely")

TIMES = {
    "dawn": ("at dawn", "at dawn", "at sunrise", "in the early morning", "at daybreak", "in the morning"),
    "day": ("during the day", "by day", "in daylight", "at noon", "in the daytime", "at midday"),
    "sunset": ("at sunset", "at sunset", "at dusk", "in the evening", "in the evening light"),
    "night": ("at night", "at night", "by night", "at midnight", "in the night", "late at night"),
}
# Said only under a clear sky.
CLEAR_TIMES = {
    "dawn": ("on a clear morning", "as the sun rises"),
    "day": ("on a sunny day", "in the sunshine", "on a clear day"),
    "sunset": ("on a clear evening", "as the sun sets"),
    "night": (
        "under the stars",
        "on a starry night",
        "in the moonlight",
        "on a clear night",
        "under the moon",
    ),
}
TIME_NOUNS = {
    "dawn": ("morning",),
    "day": ("day", "afternoon"),
    "sunset": ("evening",),
    "night": ("night",),
}
WEATHERS = {
    "clear": ("under a clear sky", "in clear weather", "with a clear sky"),
    "cloudy": ("under a cloudy sky", "under an overcast sky", "in cloudy weather", "under grey clouds"),
    "rain": ("in the rain", "in the rain", "with rain falling", "while it rains", "in rainy weather"),
    "snow": (
        "in the snow",
        "in the snow",
        "with snow falling",
        "while it snows",
        "in winter",
        "as snow falls",
    ),
}
WEATHER_ADJECTIVES = {
    "cloudy": ("cloudy", "overcast", "grey"),
    "rain": ("rainy", "rainy", "wet"),
    "snow": ("snowy", "snowy", "wintry", "snow-covered"),
}

POSITIONS = {
    "left": ("on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right side", "at the right"),
    "middle": ("in the middle", "in the center", "in the centre"),
}
# Of two things: the first said first, or the second said first.
RELATIONS = {
    "left of": ("to the left of", "left of", "on the left of"),
    "above": ("above", "above", "over", "flying above", "floating over"),
}
INVERSE = {
    "left of": ("to the right of", "right of", "on the right of"),
    "above": ("below", "under", "beneath", "underneath"),
}
BESIDE = ("next to", "beside", "near", "and")

OPENINGS = (
    *("a picture of", "an illustration of", "a drawing of", "a postcard of", "a scene with", "a view of"),
    *("the picture shows", "this is", "here is", "we see", "an image of", "a painting of"),
)
EXISTS_ONE = ("there is", "there's", "there is")
EXISTS_MANY = ("there are",)
TAGS = {
    "dawn": ("dawn", "sunrise", "early morning"),
    "day": ("day", "daytime"),
    "sunset": ("sunset", "dusk", "evening"),
    "night": ("night", "nighttime"),
    "clear": ("clear", "clear sky"),
    "cloudy": ("cloudy", "clouds", "overcast"),
    "rain": ("rain", "rainy"),
    "snow": ("snow", "snowy", "winter"),
    "sea": ("sea", "ocean"),
    "beach": ("beach", "seaside", "shore"),
    "meadow": ("meadow", "hills", "countryside"),
    "mountains": ("mountains", "alps"),
    "forest": ("forest", "woods"),
    "desert": ("desert", "dunes"),
    "city": ("city", "town", "skyline"),
}
