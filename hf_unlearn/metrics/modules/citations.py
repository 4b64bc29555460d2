"""BibTeX of the papers that the modules implement."""

from __future__ import annotations

TOFU = """\
@article{maini2024tofu,
    title={{TOFU}: A Task of Fictitious Unlearning for {LLMs}},
    author={Maini, Pratyush and Feng, Zhili and Schwarzschild, Avi and Lipton, Zachary C. and Kolter, J. Zico},
    journal={arXiv preprint arXiv:2401.06121},
    year={2024}
}
"""

MUSE = """\
@article{shi2024muse,
    title={{MUSE}: Machine Unlearning Six-Way Evaluation for Language Models},
    author={Shi, Weijia and Lee, Jaechan and Huang, Yangsibo and Malladi, Sadhika and Zhao, Jieyu and Holtzman, Ari
            and Liu, Daogao and Zettlemoyer, Luke and Smith, Noah A. and Zhang, Chiyuan},
    journal={arXiv preprint arXiv:2407.06460},
    year={2024}
}
"""

MIN_K = """\
@article{shi2023detecting,
    title={Detecting Pretraining Data from Large Language Models},
    author={Shi, Weijia and Ajith, Anirudh and Xia, Mengzhou and Huang, Yangsibo and Liu, Daogao and Blevins, Terra
            and Chen, Danqi and Zettlemoyer, Luke},
    journal={arXiv preprint arXiv:2310.16789},
    year={2023}
}
"""

MIN_K_PLUS_PLUS = """\
@article{zhang2024mink,
    title={{Min-K}\\%++: Improved Baseline for Detecting Pre-Training Data from Large Language Models},
    author={Zhang, Jingyang and Sun, Jingwei and Yeats, Eric and Ouyang, Yang and Kuo, Martin and Zhang, Jianyi and
            Yang, Hao Frank and Li, Hai},
    journal={arXiv preprint arXiv:2404.02936},
    year={2024}
}
"""

LOSS_ATTACK = """\
@inproceedings{yeom2018privacy,
    title={Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting},
    author={Yeom, Samuel and Giacomelli, Irene and Fredrikson, Matt and Jha, Somesh},
    booktitle={IEEE Computer Security Foundations Symposium},
    year={2018}
}
"""

ROUGE = """\
@inproceedings{lin2004rouge,
    title={{ROUGE}: A Package for Automatic Evaluation of Summaries},
    author={Lin, Chin-Yew},
    booktitle={Text Summarization Branches Out},
    year={2004}
}
"""

EXTRACTION = """\
@inproceedings{carlini2021extracting,
    title={Extracting Training Data from Large Language Models},
    author={Carlini, Nicholas and Tram{\\`e}r, Florian and Wallace, Eric and Jagielski, Matthew and Herbert-Voss, Ariel
            and Lee, Katherine and Roberts, Adam and Brown, Tom and Song, Dawn and Erlingsson, {\\'U}lfar and
            Oprea, Alina and Raffel, Colin},
    booktitle={USENIX Security Symposium},
    year={2021}
}
"""

EXACT = """\
@inproceedings{tirumala2022memorization,
    title={Memorization Without Overfitting: Analyzing the Training Dynamics of Large Language Models},
    author={Tirumala, Kushal and Markosyan, Aram H. and Zettlemoyer, Luke and Aghajanyan, Armen},
    booktitle={Advances in Neural Information Processing Systems},
    year={2022}
}
"""

OPEN_UNLEARNING = """\
@article{dorna2025openunlearning,
    title={{OpenUnlearning}: Accelerating {LLM} Unlearning via Unified Benchmarking of Methods and Metrics},
    author={Dorna, Vineeth and Mekala, Anmol and Zhao, Wenlong and McCallum, Andrew and Lipton, Zachary C. and
            Kolter, J. Zico and Maini, Pratyush},
    journal={arXiv preprint arXiv:2506.12618},
    year={2025}
}
"""
