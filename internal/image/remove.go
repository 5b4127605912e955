package image

import "context"

// Remove drops a reference and what only it needed. An image that sandboxes
// use is refused with ImageInUse unless force is set; then its files stay until
// no sandbox uses them.
func (s *Store) Remove(ctx context.Context, ref string, force bool) error { panic("not yet") }

// PruneReport says what Prune removed.
type PruneReport struct {
	References, Manifests, Layers, Roots int
	Bytes                                int64
}

// Prune removes every reference that no sandbox uses, and all files that no
// reference needs.
func (s *Store) Prune(ctx context.Context) (PruneReport, error) { panic("not yet") }
