"""Documents: the weights stand where the text says, and a prompt has the tokens a sampler will be given."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxalign.data.text import Document, chat, fill, fit, plain, prompt_completion


@pytest.fixture(scope="module")
def smollm(shared):
    return AutoTokenizer.from_pretrained(shared / "data" / "models" / "smollm2_135m_instruct")


@pytest.fixture(scope="module")
def stories(shared):
    return AutoTokenizer.from_pretrained(shared / "data" / "models" / "stories260k")


@pytest.fixture(scope="module")
def words():
    made = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1, "film": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def targets(document):
    return document.tokens[document.weights > 0].tolist()


texts = st.text(alphabet=st.sampled_from("ab Z1.\n\t'é漢😀"), max_size=12)


@settings(deadline=None, max_examples=60)
@given(prompt=texts.filter(bool), completion=texts)
@example(prompt="ab ", completion="ab")
@example(prompt="ab\n", completion="\nab")
def test_prompt_completion_cuts_where_the_text_does(smollm, prompt, completion):
    document = prompt_completion(smollm, prompt, completion)
    alone = prompt_completion(smollm, prompt, "", eos=False)
    assert document.tokens[: len(alone.tokens)].tolist() == alone.tokens.tolist() == smollm(prompt)["input_ids"]
    assert document.weights.tolist() == [0] * len(alone.tokens) + [1] * (len(document.tokens) - len(alone.tokens))
    assert smollm.decode(document.tokens) == prompt + completion + smollm.eos_token


@settings(deadline=None, max_examples=60)
@given(prompt=texts.filter(bool), completion=texts)
@example(prompt="ab ", completion="ab")
@example(prompt="ab\n", completion="\nab")
def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_inside(stories, prompt, completion):
    document = prompt_completion(stories, prompt, completion, eos=False)
    alone = prompt_completion(stories, prompt, "", eos=False)
    assert document.tokens[: len(alone.tokens)].tolist() == alone.tokens.tolist() == stories(prompt)["input_ids"]
    if "漢" not in prompt + completion:  # which this vocabulary cannot spell
        assert stories.decode(document.tokens, skip_special_tokens=True) == prompt + completion


def test_offsets_that_leave_out_spaces_are_not_trusted(smollm):
    made = Tokenizer.from_str(smollm.backend_tokenizer.to_str())
    made.post_processor = processors.ByteLevel(trim_offsets=True)  # as GPT-2 has it: " yes" is said to start at its "y"
    trimmed = PreTrainedTokenizerFast(tokenizer_object=made)
    document = prompt_completion(trimmed, "Answer: ", "yes", eos=False)
    assert trimmed.decode(document.tokens) == "Answer: yes"
    assert document.tokens[:-1].tolist() == trimmed("Answer: ")["input_ids"]


def test_bos_and_eos_stand_once(stories, smollm):
    bos = stories.bos_token_id
    assert bos == stories.eos_token_id == 1  # one token for both, so neither can be found by its id
    document = prompt_completion(stories, "Once upon", " a time")
    assert document.tokens.tolist() == [*stories("Once upon a time")["input_ids"], 1] and document.tokens[0] == bos
    assert document.weights[0] == 0 and document.weights[-1] == 1
    assert prompt_completion(stories, "<s>Once upon", " a time<s>").tokens.tolist().count(1) == 2
    assert plain(stories, "").tokens.tolist() == [1, 1]  # a story that ends before it began
    assert plain(smollm, "a<|im_end|>").tokens.tolist() == plain(smollm, "a").tokens.tolist()
    assert plain(smollm, "a", eos=False, bos=True).tokens.tolist() == [smollm.bos_token_id, *smollm("a")["input_ids"]]
    assert plain(smollm, "a b").weights.tolist() == [0, 1, 1]


def test_an_empty_completion_learns_to_stop_even_behind_an_end_in_the_prompt(smollm):
    document = prompt_completion(smollm, "a<|im_end|>", "")
    assert targets(document) == [smollm.eos_token_id]


def test_a_word_on_the_boundary_is_not_lost(words):
    document = prompt_completion(words, "good aaa", "zzz film", eos=False)  # as one text: good, unknown, film
    assert document.tokens.tolist() == [1, 0, 0, 2] and document.weights.tolist() == [0, 0, 1, 1]


def test_a_missing_special_token_is_an_error(words):
    with pytest.raises(ValueError, match="no EOS token"):
        plain(words, "good film")
    with pytest.raises(ValueError, match="no BOS token"):
        plain(words, "good film", eos=False, bos=True)


TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi\n"},
    {"role": "assistant", "content": "Hé, **you** 😀"},
    {"role": "user", "content": "assistant\nHé, **you** 😀"},  # the answer's own words, said by another
    {"role": "assistant", "content": " bye"},
]


def test_chat_trains_on_the_assistant_and_its_end_only(smollm):
    document = chat(smollm, TALK)
    assert smollm.decode(targets(document)) == "Hé, **you** 😀<|im_end|> bye<|im_end|>"
    assert (np.diff(document.weights) > 0).sum() == 2
    whole = smollm.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert document.tokens.tolist() == whole[:-1]  # the line break behind the last end is left out: nobody samples it


@pytest.mark.parametrize("answer", ["Hello", "\n\nHello", " Hello", "", "<|im_end|>", "one<|im_end|>\n<|im_start|>user\ntwo"])
def test_the_prompt_sampled_from_is_a_prefix_of_the_document_trained_on(smollm, answer):
    talk = [*TALK[:2], {"role": "assistant", "content": answer}, *TALK[3:]]
    document = chat(smollm, talk)
    for turn in (2, 4):
        prompt = chat(smollm, talk[:turn], generate=True)
        assert prompt.weights.sum() == 0
        assert document.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()
        assert document.weights[len(prompt.tokens)] == 1 and document.weights[len(prompt.tokens) - 1] == 0
    assert smollm.decode(targets(document)) == answer + "<|im_end|> bye<|im_end|>"


def test_chat_on_a_tokenizer_with_a_space_before_every_text(stories):
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content.strip() }}{{ '<s>' if m.role == 'assistant' else '\n' }}{% endfor %}"
    )
    stories.chat_template = template + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    document = chat(stories, TALK[1:])
    stories.chat_template = None
    assert stories.decode(targets(document)) == "Hé, **you** 😀<s> bye<s>"
    assert stories.decode(document.tokens).startswith("user: Hi\nassistant: Hé")


def refuses(tokenizer, template, messages, says, **kwargs):
    kept = tokenizer.chat_template
    tokenizer.chat_template = template or kept
    try:
        with pytest.raises(ValueError, match=says):
            chat(tokenizer, messages, **kwargs)
    finally:
        tokenizer.chat_template = kept


def test_chats_that_cannot_be_learnt_from_are_refused(smollm):
    says = "{% for m in messages %}{{ m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
    says += "{% if add_generation_prompt %}{{ 'assistant>' }}{% endif %}"
    refuses(smollm, None, [], "it is empty")
    refuses(smollm, None, TALK[2:], "starts with a message to the assistant")
    refuses(smollm, None, TALK[:2], "no turn of the assistant to learn from")
    refuses(smollm, None, TALK, "last word already", generate=True)
    refuses(smollm, None, [{"role": "user", "content": None}], "message 0 is not")
    refuses(smollm, None, [{"role": "user"}], "message 0 is not")
    refuses(smollm, says.replace("m.content", "(m.content if loop.last else 'x')"), TALK, "otherwise once more of them follow")
    refuses(smollm, says.replace("'assistant>'", "'Answer:'"), TALK, "otherwise once more of them follow")
    refuses(smollm, says.replace("<|im_end|>", "!"), TALK, "message 2 without a special token")
    refuses(smollm, "{{ raise_exception('no system here') }}", TALK, "refuses the roles .*no system here")


def test_fit_keeps_one_end_and_no_weight_on_the_first_token():
    document = Document(np.arange(6, dtype=np.int32), np.array([0, 0, 1, 1, 1, 1], np.float32))
    assert fit(document, 6) is document
    assert fit(document, 3).tokens.tolist() == [0, 1, 2] and fit(document, 3).weights.tolist() == [0, 0, 1]
    assert fit(document, 3, keep="end").tokens.tolist() == [3, 4, 5] and fit(document, 3, keep="end").weights.tolist() == [0, 1, 1]
    assert document.weights.tolist() == [0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="'start' and 'end'"):
        fit(document, 3, keep="left")


def test_fill_takes_columns_and_indices():
    row = {"q": "a{b}", "targets": ["x", "y"], "answers": {"text": ["z"]}, "n": 3, "two words": "w"}
    assert fill("{q}\n{targets[1]} {answers[text][0]} {n} {two words} {{q}}", row) == "a{b}\ny z 3 w {q}"


@pytest.mark.parametrize(
    "template, says",
    [
        ("{question}", "'{question}' of the template is not a column; the columns are: q, targets, none"),
        ("{q.__class__}", "not a column"),
        ("{q!r}", "not a column"),
        ("{q:>10}", "not a column"),
        ("{}", "not a column"),
        ("{targets[0].upper}", "not a column"),
        ("{targets[5]}", r"there is no \[5\]"),
        ("{targets[text]}", r"there is no \[text\]"),
        ("{q[0]}", r"there is no \[0\]"),
        ("{targets}", r"no text but a list of 1; \{targets\[0\]\} is its first"),
        ("{none}", "no text but None"),
        ("{q", "template '{q': "),
    ],
)
def test_fill_refuses_what_is_no_column(template, says):
    with pytest.raises(ValueError, match=says):
        fill(template, {"q": "a", "targets": ["x"], "none": None})
