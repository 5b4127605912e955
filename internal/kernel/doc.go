// Package kernel keeps guest kernels and makes the initramfs that boots them.
//
// A kernel is a directory kernels/HASH of the home: kernel.json (Info), the
// image (an ELF vmlinux with a PVH entry, else a bzImage) and, for kernels that
// are not built by make kernel, the modules the agent loads, in order. HASH is
// over image and modules, so a directory never changes once it has its name;
// it is filled under another name and renamed.
//
// An initramfs is the agent as /init, /dev/console, a few empty directories and
// the modules, as an uncompressed newc archive. It is written beside the kernel
// once per agent and kernel.
//
// Packages and images are chosen by the owner of the home, so they are parsed
// with limits but trusted to be kernels: the guest is an enemy anyway.
package kernel
