"""A small diffusion model of latents, trained with diffusers and sampled through the codec's decoder.

latentprep encode shapes --codec dct:luma=6,chroma=3 --bits 8 --out shards
python examples/diffusion.py shards
"""

import argparse
from itertools import chain, islice, repeat

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

import latenttrain
from latentprep.codecs import codec_from_config

parser = argparse.ArgumentParser()
parser.add_argument("dataset")
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--channels", type=int, default=64)
parser.add_argument("--denoising", type=int, default=100)
parser.add_argument("--samples", type=int, default=16)
parser.add_argument("--weights", help="folder of the codec's weights, if it has moved")
parser.add_argument("--out", default="samples.png")
asked = parser.parse_args()

batches = latenttrain.batches(asked.dataset, batch_size=64, latents=True, seed=0)  # f32 [B,C,h,w]
manifest, device = batches.dataset.manifest, batches.samples.device
channels, height, width = manifest.latent

# Each channel at unit scale. 64 latents are enough to measure it.
some = next(iter(batches))[0]
mean, std = some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True).clamp(min=1e-3)

torch.manual_seed(0)
net = UNet2DModel(
    sample_size=(height, width), in_channels=channels, out_channels=channels, norm_num_groups=8,
    block_out_channels=(asked.channels, 2 * asked.channels), layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
).to(device)  # fmt: skip
noising = DDPMScheduler(num_train_timesteps=1000, clip_sample=False)
optimizer = torch.optim.AdamW(net.parameters(), lr=2e-4)
for step, (latents, _) in enumerate(islice(chain.from_iterable(repeat(batches)), asked.steps), 1):
    clean, noise = (latents - mean) / std, torch.randn_like(latents)
    when = torch.randint(1000, (len(latents),), device=device)
    loss = torch.nn.functional.mse_loss(net(noising.add_noise(clean, noise, when), when).sample, noise)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0 or step == asked.steps:
        print(f"step {step}: loss {loss.item():.3f}")

# From noise to latents, and through the codec's decoder to pictures.
net.eval()
noising.set_timesteps(asked.denoising)
latents = torch.randn(asked.samples, *manifest.latent, device=device)
with torch.inference_mode():
    for when in noising.timesteps:
        latents = noising.step(net(latents, when).sample, when, latents).prev_sample
    codec = codec_from_config(manifest.codec, device=device, weights=asked.weights)
    pictures = codec.decode(latents * std + mean)  # u8 [B,3,H,W]
Image.fromarray(torch.cat([*pictures], 2).permute(1, 2, 0).cpu().numpy()).save(asked.out)
print(f"wrote {asked.out}, {len(pictures)} pictures")
