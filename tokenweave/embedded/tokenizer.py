"""The embedded model's tokenizer: one token a character, whitespace ignored."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *"0123456789+="))}
CHAT_TEMPLATE = "{{ bos_token }}{{ messages[-1]['content'] }}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Encodes `12+34=` as <bos> and six characters; characters it does not know become <unk>."""
    characters = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    characters.normalizer = normalizers.Replace(Regex(r"\s+"), "")
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
