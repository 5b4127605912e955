// Package fusewire is the FUSE protocol as bytes: opcodes, flags, the fixed
// structures of requests and replies, names and directory entries. It does no
// I/O, allocates nothing and knows no file system.
//
// A request is a 40-byte [InHeader], the fixed arguments of its opcode, then
// names or data. A reply is a 16-byte [OutHeader], the fixed results, then
// data. [Decode] and [Put] copy fixed structures out of and into byte slices;
// [TakeName] is the only place where a name from the other side becomes a
// [Name], and therefore the only place where names are judged.
//
// The bytes are in the order of the machine, as FUSE wants it: guest and host
// have one architecture, and both architectures of this module are
// little-endian.
//
// The values are those of Linux' include/uapi/linux/fuse.h, protocol 7.38; a
// test compares them with an independent implementation.
package fusewire
