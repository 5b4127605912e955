package vhostuser_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/microsandbox-go/microsandbox/internal/vhostuser"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend"
	"github.com/microsandbox-go/microsandbox/internal/vhostuser/frontend/probe"
)

// TestProbes plays every hostile guest and front end we know.
func TestProbes(t *testing.T) {
	for _, p := range probe.All() {
		t.Run(p.Name, func(t *testing.T) {
			before := openFDs(t)
			results := make(chan error, 2)
			target := &probe.Target{
				Dial: func(o frontend.Options) (*frontend.Client, error) {
					ours, theirs := socketPair(t)
					go func() {
						results <- vhostuser.Serve(context.Background(), theirs, echo{}, vhostuser.Options{Logf: t.Logf})
					}()
					return frontend.Connect(ours, o)
				},
				Alive:    func(c *frontend.Client, i int) error { return alive(&served{Client: c}, i) },
				Request:  []byte("an honest request"),
				ReplyLen: 64,
			}
			if err := p.Run(target); err != nil {
				t.Error(err)
			}
			for range 2 {
				select {
				case err := <-results:
					var pe *vhostuser.ProtocolError
					if err != nil && !errors.As(err, &pe) {
						t.Logf("Serve = %v", err)
					}
				case <-time.After(patience):
					t.Fatal("the device did not end")
				}
			}
			if after := openFDs(t); after > before {
				t.Errorf("%d descriptors open before, %d after", before, after)
			}
		})
	}
}

func alive(s *served, queue int) error {
	got, err := s.do(queue, "ping")
	if err == nil && got != "ping" {
		err = errors.New("wrong echo: " + got)
	}
	return err
}
