// Package mount turns the mounts of a sandbox definition into devices, host
// directories to serve and calls for the guest agent.
//
// # Nouns
//
// A [Spec] is one mount as it was asked for. It is resolved when host paths are
// absolute, volumes have ids and the identities of what is mounted are known. A
// [Plan] is the resolved mounts of one running sandbox: open, locked, ready to
// be handed to the machine, the file server and the agent.
//
// # One launch
//
// The process that creates a sandbox calls [Validate], which is pure and knows
// the rules, and then [Provision], which looks at the host: everything that can
// be refused is refused before the first volume is made. What it resolved is
// stored with the sandbox. If the launch fails later, the function Provision
// returned takes back the volumes it made, and only those. The supervisor calls
// [Open] with what was stored: it attaches volumes, opens images and checks that
// each host path still leads to the same directory or file. Starting the
// sandbox again calls [Refresh] instead of Provision: nothing is made then.
//
// # Invariants
//
//   - The first wrong mount in the caller's order gives the error, which names
//     the mount by kind and guest path. Rules that need no host come first.
//   - A named mount is bound to a volume's id. A volume of the same name that
//     was made later is never mounted in its place.
//   - A host path is resolved once, by its owner's choice of links; from then
//     on it is opened without following any link and compared by device and
//     inode.
//   - No host path in, at or around the data directory is mounted: records,
//     locks and other sandboxes' files would be the guest's.
//   - A writable disk volume or image has one user, a read-only one any number
//     of readers: by attach lock and image lock. Directory volumes are shared.
//   - Guest mounts are listed parents first, whatever order was given.
//
// # Trust
//
// Specs come from the caller and are trusted with what the caller may do. Volume
// contents and images are the guest's: nothing in them is read here but the size
// of an image. Quotas, locks and records are volstore's; the image lock is
// diskimg's; what the guest then sees is fuseserver's and the agent's.
package mount
