"""The byte-pair vocabulary: CLIPTokenizer reads it, and any text survives it."""

from transformers import CLIPTokenizer

from ldm.pretrain.vocabulary import known_words, train_vocabulary

CAPTIONS = ["a red car in the desert at night", "two blue houses by the sea", "the red house"] * 30


def test_frequent_words_become_one_token_and_any_text_survives(tmp_path):
    train_vocabulary(CAPTIONS, merges=200, length=16, folder=tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == 16
    assert [tokenizer.convert_ids_to_tokens(i) for i in tokenizer("Red house")["input_ids"]] == [
        "<|startoftext|>",
        "red</w>",
        "house</w>",
        "<|endoftext|>",
    ]
    odd = "zebra, ø! 12"
    ids = tokenizer(odd)["input_ids"]
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == odd.replace(" ", "")


def test_padding_is_as_in_stable_diffusion(tmp_path):
    train_vocabulary(CAPTIONS, merges=200, length=16, folder=tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a car", padding="max_length", truncation=True)["input_ids"]
    assert len(ids) == 16
    assert set(ids[3:]) == {tokenizer.eos_token_id}


def test_known_words_are_those_seen_often():
    assert known_words([*CAPTIONS, "zebra"], at_least=20) == sorted(set(" ".join(CAPTIONS).split()))
