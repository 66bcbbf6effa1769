# For a layer of Yocto (scarthgap or newer) with a recipe for onnxruntime, such as meta-oe's or meta-onnxruntime's. Not run here.
SUMMARY = "Speech recognition in two passes, with a C interface"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

# The layer sets U2MOE_REPOSITORY, as "git://host/org/u2moe.git;protocol=https".
SRC_URI = "${U2MOE_REPOSITORY};nobranch=1"
SRCREV = "v${PV}"
S = "${WORKDIR}/git"

DEPENDS = "onnxruntime"
inherit cmake pkgconfig

OECMAKE_SOURCEPATH = "${S}/runtime/cpp"
# With the kernels for each instruction set of the processor's family; they are chosen when the library is loaded.
EXTRA_OECMAKE = "-DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release -DONNXRUNTIME_LIBRARY=${STAGING_LIBDIR}/libonnxruntime.so"
