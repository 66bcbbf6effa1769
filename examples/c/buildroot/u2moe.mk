################################################################################
#
# u2moe: package/u2moe of a Buildroot tree (2024.02 or newer). Untested.
#
################################################################################

U2MOE_VERSION = v0.1.0
U2MOE_SITE = $(call qstrip,$(BR2_PACKAGE_U2MOE_REPOSITORY))
U2MOE_SITE_METHOD = git
U2MOE_LICENSE = Apache-2.0
U2MOE_LICENSE_FILES = LICENSE
U2MOE_SUBDIR = runtime/cpp
U2MOE_INSTALL_STAGING = YES
U2MOE_CONF_OPTS = \
	-DBUILD_SHARED_LIBS=ON \
	-DONNXRUNTIME_ROOT=$(call qstrip,$(BR2_PACKAGE_U2MOE_ONNXRUNTIME))

$(eval $(cmake-package))
