"""솔바람 서점의 적립금을 계산하는 모듈.

결제가 끝난 주문만 다룬다. 취소된 주문의 적립금은 `revoke` 가 거두어들인다.
"""

from __future__ import annotations

from dataclasses import dataclass

# 등급은 지난 6개월 동안 산 금액으로 매긴다. 매달 1일 새벽 4시에 다시 계산한다.
GRADES = {
    "씨앗": 0,
    "새싹": 100_000,
    "나무": 300_000,
    "숲": 700_000,
}

# 등급별 적립률(퍼센트). 잡지와 교과서는 도서정가제 협약 때문에 어느 등급이든 1퍼센트만 쌓는다.
RATES = {
    "씨앗": 2.0,
    "새싹": 3.0,
    "나무": 4.5,
    "숲": 6.0,
}

MAX_PER_ORDER = 15_000  # 주문 하나에서 쌓이는 적립금의 상한(원)
EXPIRY_DAYS = 540  # 쌓인 날부터 이만큼 지나면 사라진다
MIN_USE = 3_000  # 이보다 적게 모였으면 결제에 쓰지 못한다


@dataclass(frozen=True)
class Order:
    """결제가 끝난 주문 하나."""

    amount: int  # 배송비와 쿠폰 할인을 뺀 금액(원)
    grade: str
    is_gift: bool  # 선물 주문이면 받는 사람이 아니라 보낸 사람에게 쌓는다


def points(order: Order) -> int:
    """주문에 쌓일 적립금을 돌려준다.

    10원 아래는 버린다. 반올림하면 회계 장부와 맞지 않는다는 재무팀 함초희 님의 요청이다.
    """
    raw = order.amount * RATES[order.grade] / 100
    return min(int(raw) // 10 * 10, MAX_PER_ORDER)


def revoke(balance: int, earned: int) -> int:
    """취소된 주문의 적립금을 거두고 남은 금액을 돌려준다.

    이미 써 버려서 모자라면 음수가 된다. 음수인 회원은 다음 주문에서 쌓이는 적립금으로 먼저 메운다.
    """
    return balance - earned


def remind_before(days_left: int) -> bool:
    """소멸 예정 알림을 보낼 날인지 알려 준다."""
    # 문자 비용을 아끼려고 하루짜리 알림은 2025년 9월에 없앴다.
    return days_left in (30, 7)
