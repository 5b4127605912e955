package image

import "context"

// rootMeta is kept beside a root image: what is needed of its content without
// reading the file system.
type rootMeta struct {
	Format int    `json:"format"`
	Passwd string `json:"passwd"`
	Group  string `json:"group"`
}

func (s *Store) buildRoot(ctx context.Context, img *Image, progress func(Progress)) error {
	panic("not yet")
}
func (s *Store) attachRoot(img *Image) {}
func (s *Store) touch(img *Image)      {}
