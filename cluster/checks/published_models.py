"""Where the models of the recipes are published, by the name of the folder that a recipe gives them."""

PUBLISHED = {
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "clip-vit-large-patch14": "openai/clip-vit-large-patch14",
    "eva-clip-vit-g-14": "Salesforce/blip2-itm-vit-g",
    "flan-t5-xl": "google/flan-t5-xl",
    "flan-t5-xxl": "google/flan-t5-xxl",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "opt-2.7b": "facebook/opt-2.7b",
    "opt-6.7b": "facebook/opt-6.7b",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
    "siglip2-so400m-patch14-224": "google/siglip2-so400m-patch14-224",
}
"""Names on the Hugging Face Hub; EVA-CLIP is published inside BLIP-2."""
PARTS = {"eva-clip-vit-g-14": "vision"}


def get_command(folder_url: str) -> str:
    """Return the command that makes a model's folder."""
    name = folder_url.rstrip("/").rpartition("/")[2]
    part = f" --part {PARTS[name]}" if name in PARTS else ""
    return f"isthmus models get {PUBLISHED.get(name, 'NAME_OR_FOLDER')} {folder_url}{part}"
