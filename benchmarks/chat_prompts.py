"""Chat prompts: questions, and requests to edit or summarise what Python's modules document."""

import importlib
import inspect

QUESTIONS = (
    "Explain photosynthesis to a ten-year-old.",
    "Give me a recipe for pancakes with quantities in grams.",
    "Name three differences between TCP and UDP and explain each of them.",
    "Write a short story about a lighthouse keeper.",
    "What are the main causes of the First World War?",
    "How do I remove a red wine stain from a carpet?",
    "Suggest a three-day itinerary for Lisbon.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite e-mail asking for a deadline extension.",
    "Explain how a bicycle stays upright.",
    "List five exercises for a sore back and describe each.",
    "What is recursion? Give an example.",
    "Describe the water cycle.",
    "How does a refrigerator work?",
    "Write a poem about autumn.",
    "What should I consider when buying a used car?",
    "Explain inflation in simple terms.",
    "Compare cats and dogs as pets.",
    "How do I prepare for a job interview?",
    "Who was Ada Lovelace?",
)
REQUESTS = (
    "Summarise this text in one paragraph:",
    "Correct this text's spelling and grammar and repeat it in full:",
    "Rewrite this text in the past tense:",
    "Rewrite this text as a list of bullet points:",
)
MODULES = (
    *("argparse", "cmd", "difflib", "doctest", "ftplib", "heapq", "json", "optparse"),
    *(
        "pickletools",
        "random",
        "sched",
        "shelve",
        "smtplib",
        "statistics",
        "tempfile",
        "timeit",
        "trace",
    ),
    *("typing", "unittest", "zipfile"),
)
LONGEST = 900


def edits() -> list[str]:
    """One request for each of MODULES, with up to LONGEST characters of its documentation."""
    texts = [inspect.getdoc(importlib.import_module(name)) or "" for name in MODULES]
    return [
        f"{REQUESTS[index % len(REQUESTS)]}\n\n{text[:LONGEST]}" for index, text in enumerate(texts)
    ]
