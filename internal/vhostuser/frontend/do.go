package frontend

// do is Client.Do on this queue. Whoever waits first reaps completions for all
// who wait; nobody does when nobody waits.
func (q *Queue) do(in [][]byte, outLens []int) ([]byte, error) {
	q.users.Add(1)
	defer q.users.Done()
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
	if !q.await(done) {
		return nil, ErrDisconnected // the memory may still be written: not freed
	}
	reply := c.Reply()
	q.mu.Lock()
	c.Free()
	q.mu.Unlock()
	return reply, nil
}

// await returns true when done is closed and false when the device is gone.
func (q *Queue) await(done chan struct{}) bool {
	for {
		select {
		case <-done:
			return true
		case <-q.c.wire.dead:
			return false
		case q.reaper <- struct{}{}:
			q.reap(done)
			<-q.reaper
		}
	}
}

// reap hands completions to those who wait for them until done is among them
// or the device is gone.
func (q *Queue) reap(done chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-q.c.wire.dead:
			return
		default:
		}
		q.mu.Lock()
		for c := q.Poll(); c != nil; c = q.Poll() {
			if c.done != nil {
				close(c.done)
				c.done = nil
			}
		}
		ready := q.arm()
		q.mu.Unlock()
		select {
		case <-done:
			return
		default:
		}
		if !ready && !q.sleep() {
			return
		}
	}
}
