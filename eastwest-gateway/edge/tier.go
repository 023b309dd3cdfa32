package edge

import (
	"container/list"
	"fmt"
	"math"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/entente-mesh/entente/internal/problem"
	"github.com/entente-mesh/entente/internal/refusal"
)

// maxConsumers bounds the memory of the rate limiter: the consumer seen longest
// ago is forgotten, which can only give it a full burst again.
const maxConsumers = 100_000

// tiers limits how fast each consumer may ask, by the tier in its token. The rate
// counts per consumer and per edge process. Safe for concurrent use.
type tiers struct {
	limits map[string]Tier

	mu        sync.Mutex
	consumers map[string]*list.Element // subject and tier -> element of recent
	recent    *list.List               // of *consumer, most recent first
}

type consumer struct {
	key    string
	bucket *rate.Limiter
}

func newTiers(limits map[string]Tier) *tiers {
	return &tiers{limits: limits, consumers: map[string]*list.Element{}, recent: list.New()}
}

// take counts one request of the user at now, or says why not.
func (t *tiers) take(user User, now time.Time) *problem.Problem {
	limit, ok := t.limits[user.Tier]
	if !ok {
		return &problem.Problem{Reason: refusal.TierUnknown, Detail: fmt.Sprintf("tier %q has no plan here", user.Tier)}
	}
	reservation := t.bucket(user, limit).ReserveN(now, 1)
	if wait := reservation.DelayFrom(now); wait > 0 {
		reservation.CancelAt(now)
		return &problem.Problem{Reason: refusal.Rate,
			Detail:     fmt.Sprintf("tier %s allows %g requests per second", user.Tier, limit.Rate.PerSecond),
			RetryAfter: time.Duration(math.Ceil(wait.Seconds())) * time.Second}
	}
	return nil
}

func (t *tiers) bucket(user User, limit Tier) *rate.Limiter {
	key := user.Tier + "\x00" + user.Subject
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ok := t.consumers[key]; ok {
		t.recent.MoveToFront(e)
		return e.Value.(*consumer).bucket
	}
	if t.recent.Len() >= maxConsumers {
		oldest := t.recent.Back()
		delete(t.consumers, oldest.Value.(*consumer).key)
		t.recent.Remove(oldest)
	}
	burst := limit.Burst
	if burst == 0 {
		burst = max(1, int(math.Ceil(limit.Rate.PerSecond)))
	}
	c := &consumer{key, rate.NewLimiter(rate.Limit(limit.Rate.PerSecond), burst)}
	t.consumers[key] = t.recent.PushFront(c)
	return c.bucket
}
