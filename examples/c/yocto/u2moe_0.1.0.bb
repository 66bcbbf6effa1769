# For a Yocto layer (scarthgap or newer) with an onnxruntime recipe, such as that of meta-oe or meta-onnxruntime. Untested.
SUMMARY = "Two-pass speech recognition with a C interface"
LICENSE = "Apache-2.0"
LIC_FILES_CHKSUM = "file://LICENSE;md5=3b83ef96387f14655fc854ddc3c6bd57"

# The layer must set U2MOE_REPOSITORY, such as "git://host/org/u2moe.git;protocol=https".
SRC_URI = "${U2MOE_REPOSITORY};nobranch=1"
SRCREV = "v${PV}"
S = "${WORKDIR}/git"

DEPENDS = "onnxruntime"
inherit cmake pkgconfig

OECMAKE_SOURCEPATH = "${S}/runtime/cpp"
# Includes kernels for every instruction set of the processor family. The library selects them when it is loaded.
EXTRA_OECMAKE = "-DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_TYPE=Release -DONNXRUNTIME_LIBRARY=${STAGING_LIBDIR}/libonnxruntime.so"
