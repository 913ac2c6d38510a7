"""RULER's thirteen kinds of long-context tasks on texts that are made here.

Source: Hsieh et al. 2024, arXiv:2404.06654: kinds, counts, room for answers and scoring. Wording,
prose and documents are this project's own, so scores compare with each other, not with published
ones.
"""
