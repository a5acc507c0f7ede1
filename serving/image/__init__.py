"""serving.image draws pictures from prompts: many requests at a time by painter, one batch's steps in sampling."""
