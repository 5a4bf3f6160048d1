import shlex
import subprocess

import numpy as np
import pytest
from imageio_ffmpeg import get_ffmpeg_exe

WIDTH, HEIGHT, FRAMES, FPS = 128, 64, 90, 25
BITS = 7

X264 = "-c:v libx264 -pix_fmt yuv420p -crf 18 -g 12"
X265 = "-c:v libx265 -pix_fmt yuv420p -crf 18 -x265-params log-level=none:keyint=12:min-keyint=12"

# file: arguments of ffmpeg for the drawn frames
ENCODED = {
    "closed.mp4": f"{X264} -bf 3",
    "faststart.mp4": f"{X264} -bf 3 -movflags +faststart",
    "fragments.mp4": f"{X264} -bf 3 -movflags frag_keyframe+empty_moov",
    "opengop.mp4": f"{X264} -bf 3 -x264-params open-gop=1",
    "refresh.mp4": f"{X264} -intra-refresh 1",
    "interlaced.mp4": f"{X264} -flags +ildct+ilme -x264-params tff=1",
    "full444.mp4": "-c:v libx264 -pix_fmt yuv444p -g 12",
    "late.mp4": f"{X264} -bf 3 -output_ts_offset 5",
    "closed.mkv": X264,
    "opengop.mkv": f"{X264} -bf 3 -x264-params open-gop=1",
    "closed.ts": X264,
    "opengop.ts": f"{X264} -bf 3 -x264-params open-gop=1",
    "h264.m2ts": f"{X264} -bf 3",
    "h264.flv": f"{X264} -bf 3",
    "h264.avi": f"{X264} -bf 3",
    "raw.h264": f"{X264} -bf 3",
    "hevc.mp4": X265,
    "hevc10.mov": X265.replace("yuv420p", "yuv420p10le"),
    "hevc.mkv": X265,
    "hevc.ts": X265,
    "mpeg4.avi": "-c:v mpeg4 -q:v 3 -bf 2",
    "packed.avi": "-c:v libxvid -q:v 3 -bf 2",
    "mpeg4.mp4": "-c:v mpeg4 -q:v 3 -bf 2",
    "mpeg2.mpg": "-c:v mpeg2video -q:v 3 -bf 2 -g 12",
    "mpeg2.ts": "-c:v mpeg2video -q:v 3 -bf 2 -g 12",
    "mpeg2.mkv": "-c:v mpeg2video -q:v 3 -bf 2 -g 12",
    "wmv2.wmv": "-c:v wmv2 -q:v 3",
    "vp8.webm": "-c:v libvpx -b:v 500k -auto-alt-ref 1 -lag-in-frames 16 -cpu-used 4",
    "vp9.webm": "-c:v libvpx-vp9 -b:v 500k -g 30 -auto-alt-ref 1 -lag-in-frames 16 -cpu-used 5",
    "av1.mp4": "-c:v libsvtav1 -preset 8 -crf 10 -g 12",
    "av1.mkv": "-c:v libsvtav1 -preset 10 -crf 20 -g 12",
    "prores.mov": "-c:v prores_ks",
    "mjpeg.avi": "-c:v mjpeg -q:v 3 -pix_fmt yuvj420p",
    "ffv1.mkv": "-c:v ffv1",
    "flv1.flv": "-c:v flv -q:v 3",
    "gif.gif": "",
    "variable.mkv": f"-vf \"setpts='if(lt(N,30),N,30+(N-30)*4)/25/TB'\" -fps_mode vfr {X264}",
    "jitter.mkv": f"-vf \"setpts='(N+0.4*mod(N,2))/25/TB'\" -fps_mode vfr {X264}",
    "film.mkv": f"-vf setpts='N*1001/24000/TB' -r 24000/1001 {X264}",
    "wide.mp4": f"-vf setsar=2/1 {X264}",
    "narrow.mp4": f"-vf setsar=1/2 {X264}",
    "pq.mp4": f"-vf setparams=color_trc=smpte2084:color_primaries=bt2020:colorspace=bt2020nc {X264}",
    "bt709.mp4": f"-vf setparams=color_trc=bt709:color_primaries=bt709:colorspace=bt709 {X264}",
}
# file: arguments of ffmpeg for a file from above
COPIED = {
    "cut.mp4": "-ss 1.3 -i closed.mp4 -c copy",
    "cut_open.mp4": "-ss 1.3 -i opengop.mp4 -c copy",
    "cut_hevc.mp4": "-ss 1.3 -i hevc.mp4 -c copy",
    "cut_hevc.mkv": "-ss 1.3 -i hevc.mkv -c copy",
    "cut.ts": "-ss 1.3 -i closed.mp4 -c copy",
    "mirrored.mp4": "-display_hflip -i closed.mp4 -c copy",
    "upside_down.mp4": "-display_vflip -i closed.mp4 -c copy",
    "turned90.mp4": "-display_rotation 90 -i closed.mp4 -c copy",
    "turned180.mp4": "-display_rotation 180 -i closed.mp4 -c copy",
    "turned270.mkv": "-display_rotation 270 -i closed.mp4 -c copy",
    "turned_mirrored.mp4": "-display_rotation 90 -display_hflip -i closed.mp4 -c copy",
    "turned_wide.mp4": "-display_rotation 90 -i wide.mp4 -c copy",
    "turned45.mp4": "-display_rotation 45 -i closed.mp4 -c copy",
}


def draw(n: int) -> np.ndarray:
    """A frame that shows its number, with a white or black block for each bit, and what is up and what is left."""
    image = np.full((HEIGHT, WIDTH, 3), (60, 120, 200), np.uint8)
    image[40:60, n % 90 : n % 90 + 30] = (240, 240, 20)
    image[:4, 64:] = (200, 30, 30)
    for bit in range(BITS):
        image[8:32, 8 + 16 * bit : 24 + 16 * bit] = 255 if n >> bit & 1 else 0
    return image


@pytest.fixture(scope="session")
def number():
    """Tells the number that is drawn in a frame `(H, W, 3)`."""
    return lambda image: sum(
        1 << bit for bit in range(BITS) if image[14:26, 12 + 16 * bit : 20 + 16 * bit].mean() > 128
    )


@pytest.fixture(scope="session")
def numbered(tmp_path_factory):
    """Makes a video of `ENCODED` or `COPIED` at its first use and gives its path."""
    folder = tmp_path_factory.mktemp("numbered")
    frames = b"".join(draw(n).tobytes() for n in range(FRAMES))
    drawn = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i -".split()

    def make(name):
        if not (folder / name).exists():
            ffmpeg = [get_ffmpeg_exe(), "-v", "error"]
            if name in ENCODED:
                command = [*ffmpeg, *drawn, *shlex.split(ENCODED[name]), name]
            else:
                arguments = shlex.split(COPIED[name])
                make(arguments[arguments.index("-i") + 1])
                command = [*ffmpeg, *arguments, name]
            subprocess.run(
                command, input=frames, cwd=folder, check=True, stderr=subprocess.DEVNULL, env={"SVT_LOG": "0"}
            )
        return folder / name

    return make
