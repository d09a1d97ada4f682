"""Guidances by name, each a small function of what the network's branches said; docs/guidance.md lists them.

A chain (`chain.py`) asks the network for the branches that its parts read, in one call, and lets each part
change the answer in turn. A part (`part.py`) is a frozen dataclass of its options, registered in
`catalogue.py`. It has

- ``rank``: when its turn comes (PREPARES branches, COMBINES them, ADDS a term, FINISHES the sum);
- ``reads``: the branches it must be given, beside "cond";
- ``change(answer) -> answer``, raw outputs of the network to raw outputs; or, where it remembers earlier
  steps, ``begin()``, which gives a new such function for each drawing. Nothing is kept in the part itself.

A branch is named by its text: "cond", "uncond", "image", "empty", "cond_1" (of a composed prompt). After a
colon stands in which way the network answers, if not in its usual one: "cond:perturbed" has the text of
"cond" and something else done in attention's place, "cond:worse" the text of "cond" and another network. Such
a name needs no Conditioning of its own: `ldm.diffusion.guidance.text_of` says whose it takes, in every step,
and `ldm.diffusion.guidance.composed` composes it as it does "cond".

So a guidance that perturbs attention is a part here that ADDS, with ``reads = ("cond:perturbed",)``; what is
done in attention's place is in `ldm/pipeline/deciding/guiding.py`, whose table ``ATTENDING`` takes the part's
class to a function ``(part, model) -> tuple[Attending, ...]``, and these are put into the Job. An Attending
is told the names of the branches, one for each group of rows, and changes those with its ending alone. What
looks at no branches and only changes the network (FreeU) has ``reads = ()`` and an entry in that table. A
part that wants the network's answer at another state (SAG) calls ``answer.predict``.
"""
