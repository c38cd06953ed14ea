"""Prompts as values: text in, text out, and no model, which only the embeddings of `retrieval` know.

    pretrain  a model of text gives every text a probability
    prompt    a template makes an input a text with a slot [Z], behind demonstrations    template, demonstrations, retrieval
    predict   of all z, the one that makes the text most probable is an answer           answers.search, constrain, reasoning
              and means a label y                                                        answers.of_labels, extract

Liu et al. 2021, Pre-train, Prompt, and Predict. The same prompt serves evaluation, SFT, RL and feedback: `template.document`.
"""
