// Package image keeps OCI images: it fetches them, and makes of each one the
// read-only root file system that all its sandboxes share.
//
// An image is named by a reference (registry, repository, tag or digest). The
// reference leads to a manifest, the manifest to a configuration and to layers;
// these are blobs, files named by the SHA-256 digest of their content. The
// root image is an ext4 file system made of the layers, named by the digest of
// the manifest.
//
//	images/index.json           references; all else is derived from the blobs
//	images/index.lock           flock around a change of index.json
//	images/use.lock             flock: shared by whoever puts blobs that no
//	                            reference names yet, exclusive by the collector
//	images/blobs/sha256/HEX     manifests, configurations, layers
//	images/blobs/sha256/HEX.partial  a blob being fetched
//	images/rootfs/HEX.ext4      a root image, never changed once it is there
//	images/rootfs/HEX.json      its size, and the image's passwd and group files
//	images/rootfs/HEX.ext4.building  a root image being made
//
// A pull resolves the reference to the manifest for this host, fetches the
// blobs that are missing, builds the root image if there is none and then names
// it in the index. A load does the same from an archive. A file that is being
// made is its maker's lock: whoever wants the same digest waits on it and then
// finds it complete, and what a killed maker left is free at once, to be
// continued (a blob, after hashing what is there) or begun anew (a root image).
//
// # Merging layers
//
// Nothing is unpacked to the host. The layers are read twice. First all their
// headers are merged into a tree of names and inodes in memory (tree, merge):
// the last entry of a path wins, whiteouts hide what lower layers put, hard
// links share an inode also across layers, and symbolic links in a path are
// followed inside the tree, where ".." of the root is the root. Then the tree is
// laid out and written as a file system (package ext4), and the files that are
// left are copied behind it, each layer from front to back (emit). No step needs
// root, and no name of an archive is ever a name on the host.
//
// # Invariants
//
//   - A blob, a root image and the index are absent or complete; each is synced
//     before it gets its name, and its directory after.
//   - What the index names is there: references are set last and dropped first.
//   - A digest in a file name has passed parseDigest.
//   - The content of a blob was hashed when it was written, a layer's
//     uncompressed content when its root image was made.
//   - Equal manifests give equal root images, byte for byte.
//
// Lock order: use.lock, a file being made (one at a time in a goroutine),
// index.lock. Reading takes no lock.
//
// # Trust
//
// Registries, archives and images are hostile. limits bounds documents, paths,
// entries, layers, memory for names, unpacked bytes, their ratio to the
// compressed ones, and the space left on the host. The home belongs to us.
//
// Which images sandboxes use is told by the caller (Store.Users); overlays,
// disks and mounting are the supervisor's and the guest's.
package image
