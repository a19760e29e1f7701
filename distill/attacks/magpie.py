from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from distill.attacks.asking import Asking, writing
from distill.attacks.novelty import Novelty
from distill.contracts import LanguageOracle
from distill.errors import DistillError
from distill.language import Prompts, SyntheticSet, texts
from distill.randomness import derive
from distill.records import Reveals

MARK = "\x1fhere\x1f"  # where the user's words stand in a rendered template


class Magpie:
    """An aligned teacher is given its chat template up to the user's turn, and writes what a user might say.

    Paper: Magpie: Alignment Data Synthesis from Scratch by Prompting Aligned LLMs with Nothing, Xu et al., ICLR 2025,
    sec. 2.1. Threat model: no prompts at all (the pool is not read), but raw access: the API completes plain text
    without a chat around it, and the teacher's chat template is known. Own local teachers have both; most commercial
    APIs have neither. What was written is kept where it ended by itself and is new, and is asked as a chat. Requests
    for prompts are paid for like answers; a last single answer is left.

    Args:
        system_prompt: Put before the user's turn while prompts are written, to steer what they are about; null: none.
        max_prompts: The attack ends with so many prompts, whatever is left of the budget.
        novelty: A prompt is dropped where its ROUGE-L with an earlier one is at least this; at 1, where it has the same
            words in the same order.
        max_tokens, temperature, top_p: How prompts are drawn.
        prompts_at_once: How many are written between two looks at what is new.
        patience: So many rounds without a new prompt end the attack.

    Raises:
        DistillError: A number is out of range.
    """

    requires: ClassVar[Reveals] = Reveals.LABEL
    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        system_prompt: str | None = None,
        max_prompts: int = 300_000,
        novelty: float = 1.0,
        max_tokens: int = 2048,
        temperature: float = 1.0,
        top_p: float = 1.0,
        prompts_at_once: int = 64,
        patience: int = 5,
    ) -> None:
        if temperature <= 0:
            raise DistillError(f"temperature must be above 0, not {temperature}: the same prompt would come each time")
        if not 0 < novelty <= 1:
            raise DistillError(f"novelty must be above 0 and at most 1, not {novelty}")
        if prompts_at_once < 1:
            raise DistillError(f"prompts_at_once must be at least 1, not {prompts_at_once}")
        self.system_prompt, self.max_prompts, self.novelty = system_prompt, max_prompts, novelty
        self.prompts_at_once, self.patience = prompts_at_once, patience
        self.sampling = writing(max_tokens, temperature, top_p)

    def synthesise(self, oracle: LanguageOracle, pool: Prompts, samples: int, seed: int) -> SyntheticSet:
        """Raises `DistillError` where the template is not known."""
        before, after = user_turn(oracle.tokenizer, self.system_prompt)
        stop = (after,) if after else ()
        sampling = replace(self.sampling, stop=stop, seed=derive(seed, "attack", "prompts"))
        opening = Prompts(texts([before]), chat=False, name="magpie")
        asking = Asking(oracle, samples)

        def write(requests: int, _: list[str]) -> list[str]:
            written = asking.write(opening, sampling, samples=requests)
            return [
                text.strip() for text, finish in zip(written.column, written.finish, strict=True) if finish == "stop"
            ]

        own = asking.invent(
            write,
            Novelty(self.novelty),
            at_once=self.prompts_at_once,
            cost=1 + samples,
            most=self.max_prompts,
            patience=self.patience,
        )
        return asking.collected(f"Magpie: {len(own)} prompts that the teacher made of nothing")


def user_turn(tokenizer: Any, system_prompt: str | None) -> tuple[str, str]:
    """A rendered chat up to the user's first word, and the text that ends the user's turn ("" where there is none).

    Raises:
        DistillError: There is no public tokenizer, it has no chat template, or that one changes what the user says.
    """
    need = "magpie needs a teacher whose chat template is known and that continues plain text: a local one, or another "
    if tokenizer is None:
        raise DistillError(need + "attack here, since this API does not show its tokenizer", "attack")
    if tokenizer.chat_template is None:
        raise DistillError(need + "attack here, since this tokenizer has no chat template", "attack")
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    rendered = tokenizer.apply_chat_template([*system, {"role": "user", "content": MARK}], tokenize=False)
    before, mark, after = rendered.partition(MARK)
    if not mark or not before:
        raise DistillError(need + "attack here, since nothing in its template says that the user speaks", "attack")
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer(before).input_ids[:2] == [bos, bos]:  # it comes in front of plain text by itself
        before = before.removeprefix(tokenizer.bos_token)
    return before, after.strip()
