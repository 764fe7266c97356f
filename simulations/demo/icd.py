"""The demo's records: diagnosis text to ICD-10-CM chapter, at four hospitals.

The texts are descriptions and inclusion terms of the official ICD-10-CM classification (public
domain), as shipped by the package `simple_icd_10_cm`. Training, validation and test texts come
from different three-character categories (I21 is wholly in one of them): sibling codes are
near-duplicates, so a split by row would measure memory. Everything depends on the seed alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

# Chapter number -> short title; a label is a position here. Chapter 22 (codes for special
# purposes) has two categories only and is left out.
CHAPTERS: dict[str, str] = {
    "1": "Infectious",
    "2": "Neoplasms",
    "3": "Blood and immune",
    "4": "Endocrine and metabolic",
    "5": "Mental and behavioural",
    "6": "Nervous system",
    "7": "Eye",
    "8": "Ear",
    "9": "Circulatory",
    "10": "Respiratory",
    "11": "Digestive",
    "12": "Skin",
    "13": "Musculoskeletal",
    "14": "Genitourinary",
    "15": "Pregnancy and childbirth",
    "16": "Perinatal",
    "17": "Congenital",
    "18": "Symptoms and findings",
    "19": "Injury and poisoning",
    "20": "External causes",
    "21": "Health services contact",
}

# Hospital -> the chapters it specialises in. Every chapter belongs to one hospital.
SPECIALITIES: dict[str, tuple[str, ...]] = {
    "general": ("1", "4", "5", "6", "11", "18", "21"),
    "cardiology-pulmonology": ("3", "9", "10"),
    "maternity-paediatrics": ("12", "14", "15", "16", "17"),
    "trauma-oncology": ("2", "7", "8", "13", "19", "20"),
}

OWN_SHARE = 0.9  # of a hospital's records; the rest comes from all other chapters

TEXTS_PER_CATEGORY = 6
TRAIN_PER_CHAPTER = 220
VALIDATION_PER_CHAPTER = 80
TEST_PER_CHAPTER = 100
VALIDATION_CATEGORIES = 0.18
TEST_CATEGORIES = 0.22


class Record(NamedTuple):
    """One diagnosis text, its chapter's position in CHAPTERS, its three-character category."""

    text: str
    label: int
    category: str


@dataclass(frozen=True)
class Records:
    """Training records per hospital, and the coordinator's validation and test records."""

    labels: tuple[str, ...]
    train: dict[str, list[Record]]
    validation: list[Record]
    test: list[Record]


def build(seed: int, share: float = 1.0) -> Records:
    """Return the data set of a seed: disjoint training, validation and test records.

    `share` of the full data set, for a small demo.
    """
    rng = random.Random(seed)
    train: list[list[Record]] = []
    validation: list[Record] = []
    test: list[Record] = []
    for label, categories in enumerate(_texts()):
        names = sorted(categories)
        rng.shuffle(names)
        first = round(TEST_CATEGORIES * len(names))
        second = first + round(VALIDATION_CATEGORIES * len(names))

        def draw(
            part: list[str],
            limit: int,
            label: int = label,
            categories: dict[str, list[str]] = categories,
        ) -> list[Record]:
            texts = [(text, name) for name in part for text in _sample(rng, categories[name])]
            chosen = rng.sample(texts, min(round(share * limit), len(texts)))
            return [Record(text, label, name) for text, name in chosen]

        test += draw(names[:first], TEST_PER_CHAPTER)
        validation += draw(names[first:second], VALIDATION_PER_CHAPTER)
        train.append(draw(names[second:], TRAIN_PER_CHAPTER))
    return Records(tuple(CHAPTERS.values()), _hospitals(train, rng), validation, test)


def _sample(rng: random.Random, texts: list[str]) -> list[str]:
    """Return at most TEXTS_PER_CATEGORY of the texts of one category."""
    return rng.sample(texts, min(TEXTS_PER_CATEGORY, len(texts)))


def _hospitals(by_label: list[list[Record]], rng: random.Random) -> dict[str, list[Record]]:
    """Deal out each training record to one hospital, by speciality and OWN_SHARE."""
    position = {chapter: label for label, chapter in enumerate(CHAPTERS)}
    own = {
        name: [position[chapter] for chapter in chapters] for name, chapters in SPECIALITIES.items()
    }
    size = {name: sum(len(by_label[label]) for label in labels) for name, labels in own.items()}
    hospitals: dict[str, list[Record]] = {name: [] for name in own}
    for name, labels in own.items():
        # Records that leave for other hospitals, in proportion to those hospitals' sizes.
        others = {other: size[other] for other in own if other != name}
        outside = {other: sum(size.values()) - size[other] for other in others}
        for label in labels:
            pool = list(by_label[label])
            rng.shuffle(pool)
            for other in others:
                wanted = (1 - OWN_SHARE) * size[other] * len(by_label[label]) / outside[other]
                hospitals[other] += [pool.pop() for _ in range(round(wanted))]
            hospitals[name] += pool
    for records in hospitals.values():
        rng.shuffle(records)
    return hospitals


def _texts() -> list[dict[str, list[str]]]:
    """Return, per chapter, category -> distinct texts; texts that two categories share are out."""
    import simple_icd_10_cm as icd  # reads 98,505 codes: about two seconds

    chapters: list[dict[str, list[str]]] = []
    seen: dict[str, str] = {}
    for chapter in CHAPTERS:
        categories: dict[str, list[str]] = {}
        for category in filter(icd.is_category, icd.get_descendants(chapter)):
            texts = categories.setdefault(category, [])
            for code in (category, *icd.get_descendants(category)):
                if icd.is_extended_subcategory(code):  # "..., initial encounter" and the like
                    continue
                for text in (icd.get_description(code), *icd.get_inclusion_term(code)):
                    first = seen.setdefault(text.casefold(), category)
                    if first != category:
                        seen[text.casefold()] = ""
                    elif text not in texts:
                        texts.append(text)
        chapters.append(categories)
    return [
        {
            name: kept
            for name, texts in categories.items()
            if (kept := [t for t in texts if seen[t.casefold()]])
        }
        for categories in chapters
    ]
