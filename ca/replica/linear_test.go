package replica

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
)

// call is one client's put or get of one key.
type call struct {
	key string
	put bool
}

// gets answer whether the key was there; puts that end in doubt never answer.
var history = porcupine.Model{
	Partition: func(ops []porcupine.Operation) [][]porcupine.Operation {
		keys := map[string][]porcupine.Operation{}
		for _, op := range ops {
			k := op.Input.(call).key
			keys[k] = append(keys[k], op)
		}
		var parts [][]porcupine.Operation
		for _, part := range keys {
			parts = append(parts, part)
		}
		return parts
	},
	Init: func() any { return false },
	Step: func(state, input, output any) (bool, any) {
		if input.(call).put {
			return true, true
		}
		return output.(bool) == state.(bool), state
	},
}

// Writes and barrier reads are linearizable while leadership is handed around and
// leaders are cut off and come back (I10).
func TestLinearizable(t *testing.T) {
	t.Parallel()
	nodes := cluster(t, "ca1", "ca2", "ca3")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()

	var mu sync.RWMutex // held for writing while a node is replaced
	var opsMu sync.Mutex
	var ops []porcupine.Operation
	began := time.Now()
	note := func(client int, c call, out any, from, to time.Duration) {
		opsMu.Lock()
		defer opsMu.Unlock()
		ops = append(ops, porcupine.Operation{ClientId: client, Input: c, Output: out, Call: int64(from), Return: int64(to)})
	}
	var clients sync.WaitGroup
	for client := range 6 {
		clients.Go(func() {
			random := rand.New(rand.NewPCG(uint64(client), 1))
			for n := 0; ctx.Err() == nil; n++ {
				c := call{key: fmt.Sprintf("k%d", random.IntN(200)), put: random.IntN(3) == 0}
				at := nodes[random.IntN(len(nodes))]
				mu.RLock()
				replica := at.Replica
				mu.RUnlock()
				limit, done := context.WithTimeout(context.Background(), time.Second)
				from := time.Since(began)
				if c.put {
					outcome, err := replica.Propose(limit, token(c.key))
					switch {
					case err == nil && outcome.Refused == nil:
						note(client, c, nil, from, time.Since(began))
					case err == nil:
						t.Error(outcome.Refused)
					default: // it may happen at any time, or never
						note(1000+client*100000+n, c, nil, from, time.Hour)
					}
				} else if replica.Barrier(limit) == nil {
					found := (&node{Replica: replica}).has(c.key)
					note(client, c, found, from, time.Since(began))
				}
				done()
				time.Sleep(time.Millisecond)
			}
		})
	}
	for round := 0; ctx.Err() == nil; round++ {
		time.Sleep(300 * time.Millisecond)
		for _, n := range nodes {
			if !n.IsLeader() {
				continue
			}
			if round%2 == 0 {
				n.TransferLeadership(ctx)
				continue
			}
			n.kill()
			mu.Lock()
			n.start()
			mu.Unlock()
		}
	}
	clients.Wait()

	result, _ := porcupine.CheckOperationsVerbose(history, ops, 30*time.Second)
	if result != porcupine.Ok {
		t.Errorf("%d operations: %v", len(ops), result)
	}
	gets, puts := 0, 0
	for _, op := range ops {
		if op.Input.(call).put && op.Return < int64(time.Hour) {
			puts++
		} else if !op.Input.(call).put {
			gets++
		}
	}
	t.Logf("%d puts, %d gets", puts, gets)
	if puts < 20 || gets < 20 {
		t.Errorf("only %d puts and %d gets came through", puts, gets)
	}
	carryOut(t, nodes[0], token("end"))
	alike(t, nodes...)
}
