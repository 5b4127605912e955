package frontend

// do is Client.Do on this queue.
func (q *Queue) do(in [][]byte, outLens []int) ([]byte, error) {
	q.reaping.Do(func() {
		q.reaped = make(chan struct{})
		go q.reap()
	})
	lens := make([]int, len(in))
	for i, b := range in {
		lens[i] = len(b)
	}
	q.mu.Lock()
	c, err := q.NewChain(lens, outLens)
	if err != nil {
		q.mu.Unlock()
		return nil, err
	}
	c.Put(in...)
	done := make(chan struct{})
	c.done = done
	q.Submit(c)
	q.mu.Unlock()

	select {
	case <-done:
	case <-q.c.wire.dead:
		return nil, ErrDisconnected // the memory may still be written: not freed
	}
	reply := c.Reply()
	q.mu.Lock()
	c.Free()
	q.mu.Unlock()
	return reply, nil
}

// reap hands completions to who waits for them, until the client is closed.
func (q *Queue) reap() {
	defer close(q.reaped)
	for q.waitLocked() {
		q.mu.Lock()
		for c := q.Poll(); c != nil; c = q.Poll() {
			if c.done != nil {
				close(c.done)
				c.done = nil
			}
		}
		q.mu.Unlock()
	}
}

// waitLocked is Wait with q.mu held except while asleep.
func (q *Queue) waitLocked() bool {
	q.mu.Lock()
	ready := q.arm()
	q.mu.Unlock()
	if ready {
		return true
	}
	return q.sleep()
}
