"""The main job in Chinese: customer reviews, and a model taught to write good and bad ones.

    python -m experiments.speedrun --config=configs/speedrun_chinese.py --workdir=runs/chinese

Only what is Chinese differs from the main recipe: the corpora, the judge's n-grams of characters.
"""

from configs import speedrun


def get_config(arg=None):
    config = speedrun.get_config()
    config.prompts = ("房间", "这本书", "电脑")
    sources = config.pretrain.data.sources
    for name in list(sources):
        del sources[name]
    sources.reviews = speedrun.builder("chinese_reviews")
    config.finetune.data.sources.instructions.name = "chinese_reviews/clear_instructions"
    config.reward.comparisons.source.name = "chinese_reviews/clear_feedback"
    config.preference.comparisons.source.name = "chinese_reviews/clear_feedback"
    config.rlhf.prompts.name = "chinese_reviews/instructions"
    config.judge.training.name = "chinese_reviews/instructions"
    config.judge.asked.name = "chinese_reviews/instructions"
    config.judge.by_characters = True
    # Two instructions, with thousands of responses each: an epoch over prompts is no measure.
    for stage in (config.reward, config.preference):
        stage.total_epochs, stage.total_steps = None, 150
        stage.comparisons.batch_prompts = 16
    return config
